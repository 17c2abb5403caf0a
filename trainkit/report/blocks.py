"""What was measured block by block (gradient norms first), over depth and over steps, for every group of a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainkit.report.collect import Series
from trainkit.report.curves import aligned, over_runs
from trainkit.report.findings import Group
from trainkit.report.wording import BLOCK

COLUMNS = 100  # of a map; where more steps were logged, a column is the largest value of several
CELLS = 150_000  # of all maps of a page
DECADE = 10.0
FEWEST = 20  # columns, where room is short


@dataclass(frozen=True)
class Map:
    """A group's measure by block and step: cells (blocks, columns), the mean over its runs.

    NaN where nothing was logged, infinite where what was logged is finite in no run. steps: the first of each column;
    profiles: the mean at the first, the middle and the last logged step, as (step, (blocks,)).
    """

    group: int
    blocks: list[str]
    steps: np.ndarray
    cells: np.ndarray
    profiles: list[tuple[int, np.ndarray]]


@dataclass(frozen=True)
class Measure:
    """kind: grad_norm, …; site: attn, mlp, … or empty for whole blocks."""

    kind: str
    site: str
    maps: list[Map]

    @property
    def logarithmic(self) -> bool:
        """Whether it is to be drawn on a logarithmic scale: gradient norms, and what is positive and spans decades."""
        cells = np.concatenate([one.cells.ravel() for one in self.maps])
        known = cells[np.isfinite(cells)]
        wide = len(known) > 0 and known.min() > 0 and known.max() > DECADE * known.min()
        return self.kind == "grad_norm" or bool(wide)

    @property
    def name(self) -> str:
        return f"{self.kind}/blocks{'.' + self.site if self.site else ''}"


def measures(groups: Sequence[Group], shown: Sequence[int]) -> tuple[list[Measure], int]:
    """Every measure by block, with a map for each of the groups `shown`; gradient norms and whole blocks first.

    With it the number of measures for which there was no room.
    """
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.series)
    found = sorted(
        {(match["kind"], match["site"] or "") for match in map(BLOCK.match, names) if match},
        key=lambda pair: (pair[0] != "grad_norm", pair[0], pair[1] in ("norm", "residual"), pair[1]),
    )
    made: list[Measure] = []
    left = CELLS
    for number, (kind, site) in enumerate(found):
        columns = max(FEWEST, min(COLUMNS, left // max(1, (len(found) - number) * len(shown) * 12)))
        maps = [one for one in (_map(groups[g], g, kind, site, columns) for g in shown) if one is not None]
        left -= sum(one.cells.size for one in maps)
        if maps and left >= 0:
            made.append(Measure(kind, site, maps))
    return made, len(found) - len(made)


def _map(group: Group, number: int, kind: str, site: str, columns: int) -> Map | None:
    labels: dict[str, str] = {}
    for run in group.runs:
        for name in run.series:
            match = BLOCK.match(name)
            if match and match["kind"] == kind and (match["site"] or "") == site:
                labels[match["block"]] = name
    if not labels:
        return None
    blocks = sorted(labels, key=lambda block: [int(n) for n in re.findall(r"\d+", block)])
    logged = [_of_runs(group, labels[block]) for block in blocks]
    steps = np.unique(np.concatenate([series.steps for runs in logged for series in runs.values()]))
    values = np.full((len(group.runs), len(blocks), len(steps)), np.nan)
    seen = np.zeros((len(blocks), len(steps)), dtype=bool)
    for b, runs in enumerate(logged):
        for r, series in runs.items():
            at = np.searchsorted(steps, series.steps)
            values[r, b, at] = series.values
            seen[b, at] = True
    mean = over_runs(values)[0]
    mean = np.where(np.isnan(mean) & seen, np.inf, mean)
    first = np.unique(np.linspace(0, len(steps), min(len(steps), columns), endpoint=False).astype(int))
    chosen = [int(np.abs(steps - target).argmin()) for target in (steps[0], steps[-1] / 2, steps[-1])]
    cells = np.fmax.reduceat(mean, first, axis=1)
    profiles = [(int(steps[k]), mean[:, k]) for k in chosen]
    return Map(number, [".".join(re.findall(r"\d+", block)) for block in blocks], steps[first], cells, profiles)


def _of_runs(group: Group, name: str) -> dict[int, Series]:
    """The series of those runs of a group that have it, by their number in the group."""
    found = {r: run.series[name] for r, run in enumerate(group.runs) if name in run.series}
    return dict(zip(found, aligned(list(found.values())), strict=True))
