"""What a set of runs says: its groups, which of them is best and how sure that is, and in what the runs differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trainkit.launch.summary import SEED, differences, groups, mean_and_interval, varied
from trainkit.report.collect import Run
from trainkit.report.wording import title, width

# What a set of runs is judged by: the first that a finished run has; +1 where more is better.
CRITERIA = {"continual/final_average_accuracy": 1, "val/loss": -1, "test/loss": -1, "train/loss": -1}

PLACES = ("paths.", "sweep.", "resume", "callbacks.figures.title")  # settings that compute nothing


@dataclass
class Group:
    """The runs that differ in nothing but their seed; label: their words, as far as groups differ in them.

    score: the mean of the criterion over its finished runs, NaN where there is none that is finite.
    """

    label: str
    words: dict[str, str]
    runs: list[Run]
    score: float = math.nan


@dataclass
class Spread:
    """A group's criterion over seeds: mean ± half width of the 95 % interval, None where it has one run.

    less: (mean, half width, pairs) of its difference to the best group, paired by seed; None for the best itself and
    where fewer than two seeds are common.
    """

    group: Group
    seeds: int
    mean: float
    half: float | None
    less: tuple[float, float, int] | None = None


@dataclass
class Findings:
    """keys: what varies; criterion: what groups are ranked by, and sign: +1 where more is better."""

    keys: list[str]
    groups: list[Group]
    criterion: str | None
    sign: int
    spreads: list[Spread] = field(default_factory=list)
    headline: str = ""
    detail: str = ""


def find(runs: Sequence[Run]) -> Findings:
    """Groups in the order of their first run, spreads and headline from the best group down."""
    _tell_apart(runs)
    keys = varied(_words(run) for run in runs)
    others = [key for key in keys if key != SEED]
    made: dict[tuple[str, ...], Group] = {}
    for run in runs:
        values = tuple(run.words.get(key, "") for key in others)
        words = dict(zip(others, values, strict=True))
        label = " ".join(f"{key}={value}" for key, value in words.items() if value or key != "run") or (
            run.name if len(runs) == 1 else "all runs"
        )
        made.setdefault(values, Group(label, words, [])).runs.append(run)
    criterion = next((n for n in CRITERIA if any(n in r.metrics for r in runs if r.status == "finished")), None)
    found = Findings(keys, list(made.values()), criterion, CRITERIA.get(criterion or "", -1))
    if criterion:
        for group in found.groups:
            values = [r.metrics[criterion] for r in group.runs if r.status == "finished" and criterion in r.metrics]
            group.score = sum(values) / len(values) if values else math.nan
        found.spreads = _spreads(found, criterion)
    found.headline, found.detail = _told(found, runs)
    return found


def ranked(found: Findings) -> list[Group]:
    """The groups from the best to the worst; those without a finite score last, in their order."""
    return sorted(found.groups, key=lambda g: -found.sign * g.score if math.isfinite(g.score) else math.inf)


def _words(run: Run) -> list[str]:
    return [f"{key}={value}" for key, value in run.words.items()]


def _tell_apart(runs: Sequence[Run]) -> None:
    """Runs of the same words, seed included, are no sample: those of such a group get their names as a word."""
    counts = Counter(tuple(sorted(run.words.items())) for run in runs)
    twice = {_but_seed(run) for run in runs if counts[tuple(sorted(run.words.items()))] > 1}
    for run in [run for run in runs if _but_seed(run) in twice]:
        run.words["run"] = run.name


def _but_seed(run: Run) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, value) for key, value in run.words.items() if key != SEED))


def _spreads(found: Findings, name: str) -> list[Spread]:
    """From the best group down; where seeds were varied, groups of which two or more runs have finite numbers."""
    finite = [group for group in ranked(found) if math.isfinite(group.score)]
    if not finite:
        return []
    finished = {id(g): [r for r in g.runs if r.status == "finished" and name in r.metrics] for g in finite}
    jobs = [
        {"overrides": _words(run), "status": run.status, "metrics": run.metrics, "group": id(group)}
        for group in finite
        for run in finished[id(group)]
    ]
    sampled = [members[0]["group"] for _, members in groups(jobs)]
    apart = dict(zip(sampled[1:], differences(jobs, name), strict=True)) if sampled[:1] == [id(finite[0])] else {}
    spreads = []
    for group in finite:
        values = [run.metrics[name] for run in finished[id(group)]]
        mean, half = mean_and_interval(values) if len(values) > 1 else (values[0], None)
        spreads.append(Spread(group, len(values), mean, half, apart.get(id(group))))
    return spreads


# --- in one sentence -----------------------------------------------------------------------------------------------


def _told(found: Findings, runs: Sequence[Run]) -> tuple[str, str]:
    if not runs:
        return "There are no runs here.", ""
    if found.criterion is None or not found.spreads:
        return "No run has finished with a finite loss.", "What there is so far is shown below."
    name, best = title(found.criterion).lower(), found.spreads[0]
    number = f"{best.mean:.4f}" + ("" if best.half is None else f"\u00a0±\u00a0{width(best.half)}")
    if len(found.groups) == 1:
        over = "" if best.half is None else f" (mean and 95 % interval over {best.seeds} seeds, Student's t)"
        return f"The {name} is {number}{over}.", ""
    word = "highest" if found.sign > 0 else "lowest"
    headline = f"{best.group.label} has the {word} {name}: {number}."
    told = f"Mean ± half width of the 95 % interval over {best.seeds} seeds." if best.half is not None else ""
    if best.seeds < len(best.group.runs):
        told += f" Not counted: {len(best.group.runs) - best.seeds} of its {len(best.group.runs)} runs, unfinished."
    if len(found.spreads) == 1:
        return headline, f"{told} No other group has finished with a finite number.".strip()
    return headline, f"{told} {_against(found, best, found.spreads[1])}".strip()


def _against(found: Findings, best: Spread, second: Spread) -> str:
    """The best group's lead over the next, and whether seeds alone could make it."""
    if second.less is None:
        lead = f"The next is {second.group.label} with {second.mean:.4f}."
        if best.half is None and second.half is None:
            return f"{lead} One seed each, so nothing is known of how far seeds spread."
        return f"{lead} They share fewer than two seeds, so their difference is not tested."
    mean, half, pairs = second.less
    side = "below" if mean > 0 else "above"  # by the seeds that both have, which the means need not agree with
    lead = f"That is {abs(mean):.4f} ± {width(half)} {side} {second.group.label}, the next best"
    test = f"differences paired by seed, {pairs} pairs, Student's t"
    clear = "an interval without zero" if abs(mean) > half else "an interval with zero: seeds alone could make it"
    return f"{lead} ({test}): {clear}."


# --- settings ------------------------------------------------------------------------------------------------------


@dataclass
class Difference:
    """Settings that go together: `key`, and other keys that divide the runs alike; values: (value, runs with it)."""

    key: str
    values: list[tuple[str, list[str]]]
    others: list[str] = field(default_factory=list)


def config_differences(runs: Sequence[Run]) -> tuple[list[Difference], dict[str, str]]:
    """(what differs between the configurations that could be read, what is the same in all of them)."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config if not key.startswith(PLACES))
    same, by_division = {}, dict[tuple[Any, ...], Difference]()
    # A chosen word stands for what follows from it: norm=peri for the five targets that it sets.
    for key in sorted(keys, key=lambda key: (not key.startswith("choices."), key.count("."))):
        values: dict[str, list[str]] = {}
        for run in known:
            values.setdefault(run.config.get(key, "(not set)"), []).append(run.name)
        if len(values) < 2:
            same[key] = next(iter(values))
            continue
        division = tuple(map(tuple, values.values()))
        if division in by_division:
            by_division[division].others.append(key)
        else:
            by_division[division] = Difference(key.removeprefix("choices."), list(values.items()))
    return list(by_division.values()), same
