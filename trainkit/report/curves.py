"""The lines of a report: a group's mean over its runs, thinned to what a screen can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from trainkit.launch.summary import student
from trainkit.report.collect import Run, Series
from trainkit.report.findings import Group

LONGEST = 400  # points of a line
SHORTEST = 30
NEAR = 0.01  # of the run: steps of several seeds that are taken for one
IN_A_CHART = 40_000  # points that a browser draws in a fraction of a second
IN_A_PAGE = 400_000  # points of all lines: about 7 MB

student_t = cache(student)


@dataclass(frozen=True)
class Line:
    """A metric of a group by step: the mean over the runs that have a finite value there, and how many these are.

    half: half width of the mean's 95 % confidence interval by Student's t, NaN where it is over one run.
    """

    group: int
    steps: np.ndarray
    mean: np.ndarray
    half: np.ndarray
    runs: np.ndarray


def line(group: int, found: Sequence[Series]) -> Line:
    """The mean of several runs' series, at every step that any of them logged."""
    if len(found) == 1:
        values = np.where(np.isfinite(found[0].values), found[0].values, np.nan)
        return Line(group, found[0].steps, values, np.full(len(values), np.nan), np.isfinite(values).astype(int))
    found = aligned(found)
    steps = np.unique(np.concatenate([series.steps for series in found]))
    values = np.full((len(found), len(steps)), np.nan)
    for row, series in zip(values, found, strict=True):
        row[np.searchsorted(steps, series.steps)] = series.values
    return Line(group, steps, *over_runs(values))


def aligned(found: Sequence[Series]) -> Sequence[Series]:
    """Series whose steps differ slightly, at common ones: a stream's tasks, and with them its validations, end at steps
    that depend on the seed. As many points each, none apart by more than 1 % of the run; else as they are.
    """
    if len({len(series.steps) for series in found}) != 1:
        return found
    steps = np.array([series.steps for series in found])
    apart = steps.max(0) - steps.min(0)
    if not apart.any() or apart.max() > NEAR * steps.max():
        return found
    common = steps.max(0)
    return [Series(common, series.values) for series in found]


def over_runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(means, half widths of their 95 % intervals, how many are finite) of values (runs, …) over the first axis."""
    finite = np.isfinite(values)
    counts = finite.sum(0)
    known = np.where(finite, values, 0.0)
    mean = np.where(counts > 0, known.sum(0) / np.maximum(counts, 1), np.nan)
    squares = np.where(finite, (known - mean) ** 2, 0.0).sum(0)
    t = np.array([np.nan, np.nan, *(student_t(n - 1) for n in range(2, len(values) + 1))])[counts]
    return mean, t * np.sqrt(squares / np.maximum(counts - 1, 1) / np.maximum(counts, 1)), counts


def lines(groups: Sequence[Group], name: str, most: int = LONGEST) -> list[Line]:
    """One line per group that logged the metric, of at most `most` points."""
    found = []
    for number, group in enumerate(groups):
        series = [run.series[name] for run in group.runs if name in run.series]
        if series:
            full = line(number, series)
            kept = thinned(full.mean, most)
            found.append(Line(number, full.steps[kept], full.mean[kept], full.half[kept], full.runs[kept]))
    return [one for one in found if one.runs.any()]


def thinned(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most `most` of the values: both ends, and the lowest and the highest of each stretch."""
    if len(values) <= most:
        return np.arange(len(values))
    stretches = (most - 2) // 2
    width = -(-len(values) // stretches)
    padded = np.full(width * stretches, np.nan)
    padded[: len(values)] = values
    padded = padded.reshape(stretches, width)
    starts = np.arange(stretches) * width
    low = starts + np.where(np.isnan(padded), np.inf, padded).argmin(1)
    high = starts + np.where(np.isnan(padded), -np.inf, padded).argmax(1)
    kept = np.unique(np.concatenate([low, high, [0, len(values) - 1]]))
    return kept[kept < len(values)]


def length(groups: int, names: int) -> int:
    """How many points a line may have, so that neither a chart nor the page is too much for a browser."""
    room = min(IN_A_CHART, IN_A_PAGE // max(1, names)) // max(1, groups)
    return max(SHORTEST, min(LONGEST, room))


def names(runs: Iterable[Run]) -> list[str]:
    """Every metric that was logged, those outside of layers first: they are the ones to keep where room is short."""
    found = dict.fromkeys(name for run in runs for name in run.series)
    return sorted(found, key=lambda name: "blocks." in name)


def not_finite(groups: Sequence[Group], names: Sequence[str]) -> list[str]:
    """A sentence per group whose curves leave out values that are not finite."""
    told = []
    for group in groups:
        broken = {}
        for run in group.runs:
            for name in names:
                if name in run.series and not np.isfinite(run.series[name].values).all():
                    first = run.series[name].steps[~np.isfinite(run.series[name].values)][0]
                    broken[run.name] = min(int(first), broken.get(run.name, int(first)))
        if broken:
            which = ", ".join(f"run {name} from step {step:,}" for name, step in list(broken.items())[:6])
            more = f" and {len(broken) - 6} more" if len(broken) > 6 else ""
            rest = "; the mean goes over the others" if len(group.runs) > len(broken) else ""
            told.append(f"{group.label}: not finite in {which}{more}{rest}.")
    return told
