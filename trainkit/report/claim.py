"""A published statement, its runs, and what they say about it: conf/experiment/claims/*.yaml as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainkit.launch.summary import mean_and_interval
from trainkit.report import claim_measures
from trainkit.report.claim_measures import Arm
from trainkit.report.collect import Run

DIRECTIONS = ("lower", "higher", "same", "no higher")
WITHIN = ("same", "no higher")  # up to the margin


@dataclass(frozen=True)
class Claim:
    """One statement and how it is measured; from the node `experiment` of its file.

    claim, source: in words; shown: what the measured number is, with its unit. arms: {name: words of run.py}, the first
    one is what the others are compared with. grid: {key: values}, the same for every arm, which is then looked at with
    the value of its lowest mean validation loss. seeds: shared by all arms, so that differences are paired.
    measure: the name of a function in claim_measures and its arguments. expected: {arm: lower, higher, same or no
    higher}, what the statement says of that arm's number beside the first arm's; margin: differences that count as the
    same. common: all arms are looked at with one value of the grid, that of the lowest loss over all of them: for what
    depends on the grid by itself, such as the norms of weights on the learning rate. runs_of: another claim, whose runs
    are this one's, too. RUNS in a word stands for the folder of the claim's runs, one folder per arm.
    """

    name: str
    claim: str
    source: str
    shown: str
    arms: dict[str, list[str]]
    grid: dict[str, list[Any]]
    seeds: list[int]
    measure: dict[str, Any]
    expected: dict[str, str]
    margin: float = 0.0
    common: bool = False
    caveat: str = ""
    runs_of: str = ""

    def __post_init__(self) -> None:
        where = f"experiment=claims/{self.name}"
        first, *others = self.arms
        if len(self.seeds) < 3:
            raise ValueError(f"{where}: an interval takes at least 3 seeds; got {self.seeds}")
        if len(self.grid) != 1:
            raise ValueError(f"{where}: the grid has one key; got {list(self.grid)}")
        if not self.expected or set(self.expected) - set(others):
            raise ValueError(f"{where}: expected is about {others}, compared with {first}; got {list(self.expected)}")
        unknown = set(self.expected.values()).difference(DIRECTIONS)
        if unknown:
            raise ValueError(f"{where}: expected is one of {', '.join(DIRECTIONS)}; got {', '.join(unknown)}")
        if bool(set(WITHIN) & set(self.expected.values())) != (self.margin > 0):
            raise ValueError(f"{where}: {' and '.join(WITHIN)} need a margin, and nothing else; got {self.margin}")
        measure_of(self.measure)

    @property
    def key(self) -> str:
        return next(iter(self.grid))

    @property
    def home(self) -> str:
        """The claim that the runs are named after."""
        return self.runs_of or self.name


def read(path: Path) -> Claim:
    """ValueError where the file lacks something or says it wrongly."""
    import yaml

    loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    node = loaded.get("experiment") if isinstance(loaded, dict) else None
    try:
        return Claim(name=path.stem, **(node or {}))
    except TypeError as error:
        raise ValueError(f"{path} describes no claim: {error}") from error


def measure_of(node: Mapping[str, Any]) -> Callable[[Arm, int, Arm], float]:
    """The function that a claim names, with its arguments: (arm, seed, first arm) -> number."""
    settings = dict(node)
    found = claim_measures.MEASURES.get(name := settings.pop("name", ""))
    if found is None:
        raise ValueError(f"a claim's measure is one of {', '.join(claim_measures.MEASURES)}; got {name!r}")
    return lambda arm, seed, first: found(arm, seed, first, **settings)


@dataclass(frozen=True)
class Outcome:
    """What the runs say. arms: a row each; differences: {arm: (mean, half width of the 95 % interval)}.

    verdict: confirmed where every interval lies wholly on the expected side of 0 (for `same`, within the margin;
    for `no higher`, below it); not confirmed where one lies wholly elsewhere; inconclusive otherwise, and where a
    number is missing, as it is of a run that diverged.
    """

    verdict: str
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    differences: dict[str, tuple[float, float]] = field(default_factory=dict)


def arm(name: str, key: str, runs: Sequence[Run]) -> Arm:
    """The runs of an arm by (value of the grid, seed); `best`: the value whose mean validation loss is lowest.

    A run that diverged has an infinite loss.
    """
    found = {(run.words.get(key, ""), int(run.words.get("seed", "-1"))): run for run in runs}
    losses: dict[str, list[float]] = {}
    for (value, _), run in found.items():
        losses.setdefault(value, []).append(claim_measures.loss(run))
    means = {value: sum(values) / len(values) for value, values in losses.items()}
    return Arm(name, found, min(means, key=means.__getitem__, default=""))


def at_one_value(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms, all at the value of the grid whose mean loss over all of their runs is lowest."""
    values = list(dict.fromkeys(value for arm in arms.values() for value, _ in arm.runs))
    sums = {
        v: sum(claim_measures.loss(r) for a in arms.values() for (w, _), r in a.runs.items() if w == v) for v in values
    }
    best = min(sums, key=sums.__getitem__, default="")
    return {name: replace(arm, best=best) for name, arm in arms.items()}


def judge(claim: Claim, arms: Mapping[str, Arm]) -> Outcome:
    """Measures every arm and compares each with the first, seed by seed."""
    measured = measure_of(claim.measure)
    arms = at_one_value(arms) if claim.common else arms
    first = arms[next(iter(claim.arms))]
    numbers = {name: [measured(arms[name], seed, first) for seed in claim.seeds] for name in claim.arms}
    rows = {name: _row(claim, arms[name], values) for name, values in numbers.items()}
    differences = {
        name: mean_and_interval([a - b for a, b in zip(numbers[name], numbers[first.name], strict=True)])
        for name in claim.expected
        if all(map(math.isfinite, [*numbers[name], *numbers[first.name]]))
    }
    sides = [_side(claim, name, *differences[name]) for name in claim.expected if name in differences]
    if False in sides:
        verdict = "not confirmed"
    elif len(sides) == len(claim.expected) and all(sides):
        verdict = "confirmed"
    else:
        verdict = "inconclusive"
    return Outcome(verdict, rows, differences)


def _side(claim: Claim, name: str, mean: float, width: float) -> bool | None:
    """Whether an interval is where the claim wants it; None where it is neither there nor wholly elsewhere."""
    low, high = mean - width, mean + width
    fits, fails = {
        "lower": (high < 0, low > 0),
        "higher": (low > 0, high < 0),
        "same": (-claim.margin <= low and high <= claim.margin, low > claim.margin or high < -claim.margin),
        "no higher": (high <= claim.margin, low > claim.margin),
    }[claim.expected[name]]
    return True if fits else False if fails else None


def _row(claim: Claim, arm: Arm, values: Sequence[float]) -> dict[str, Any]:
    """What the table shows of an arm, at its best value of the grid."""
    best = [arm.at(seed) for seed in claim.seeds]
    losses = [claim_measures.loss(run) for run in best]
    finite = all(map(math.isfinite, values))
    return {
        "words": claim.arms[arm.name],
        claim.key: arm.best,
        "edge": arm.best in (str(claim.grid[claim.key][0]), str(claim.grid[claim.key][-1])),
        "values": list(values),
        "measured": mean_and_interval(values) if finite else None,
        "loss": mean_and_interval(losses) if all(map(math.isfinite, losses)) else None,
        "failed": sum(not math.isfinite(claim_measures.loss(run)) for run in arm.runs.values()),
        "runs": len(arm.runs),
        "parameters": _number(best, "parameters"),
        "optimizer_state_bytes": _number(best, "optimizer_state_bytes"),
        "training_flops": _number(best, "training_flops"),
        "seconds": sum(run.seconds or 0.0 for run in best if run) / len(best),
    }


def _number(runs: Sequence[Run | None], name: str) -> int | None:
    """What the runs agree in."""
    found = {run.result.get(name) for run in runs if run}
    return found.pop() if len(found) == 1 else None
