"""What a sweep over learning rates found: the final loss against the learning rate, and how sensitive it is to it.

Written at the end of `python run.py -m hparams_search=lr_sensitivity …`: lr_sensitivity.md, .csv and .png.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from trainkit.launch.rundir import write_text
from trainkit.launch.summary import SEED, Job, markdown_table, varied
from trainkit.measure.lr_sensitivity import bound, lr_sensitivity
from trainkit.report.canvas import GREY, RED, Canvas, log_ticks, write_csv

METRIC = "val/loss"
STARTS = ("vocab", "classes")  # facts of the data: as many kinds of answers, one of which a model guesses at first
COLOURS = ["#4c78a8", "#d9541e", "#2f8f5b", "#8e5ea2", "#b8860b", "#17a2b8", "#c2477f", "#5f5f5f"]
MARKERS = "osD^vPX"  # told apart without colours, too; one fewer, so that pairs repeat late
EVEN = 1.25  # the longest step of an even grid over the shortest, in the logarithm: 1, 3, 10 counts as even
MEANING = """\
LR sensitivity is E[min(l, l0) - l*] (Wortsman et al. 2023, arXiv:2309.14322): the mean over the learning rates of the
final validation loss l, where what diverged or ended above l0 counts as l0, minus the least of these losses, l*. l0 is
the loss of a model that finds all answers equally likely, about what it is at initialization: ln(vocabulary), or
ln(classes); it is computed, not measured. The number is computed for each seed and averaged; best lr and loss are of
the mean over seeds. A run has diverged where the guard stopped it or its final loss is no number."""


@dataclass(frozen=True)
class Point:
    """A group at one learning rate: the final losses of its seeds, None for a job without one (failed, not run).

    A loss of a run that diverged is NaN; `start` is l0, None where it is not known.
    """

    rate: float
    losses: dict[str, float | None]
    start: float | None

    @property
    def known(self) -> list[float]:
        """The losses that there are, bounded by l0; without l0, those that are numbers."""
        found = [loss for loss in self.losses.values() if loss is not None]
        if self.start is None:
            return [loss for loss in found if math.isfinite(loss)]
        return [bound(loss, self.start) for loss in found]

    @property
    def diverged(self) -> int:
        """How many runs the guard stopped, or ended with a loss that is no number."""
        return sum(loss is not None and not math.isfinite(loss) for loss in self.losses.values())

    @property
    def above(self) -> int:
        """How many runs ended with a number that is no better than l0: grown on the way, or nothing learnt yet."""
        limit = math.inf if self.start is None else self.start
        return sum(loss is not None and limit <= loss < math.inf for loss in self.losses.values())

    @property
    def mean(self) -> float | None:
        return math.fsum(self.known) / len(self.known) if self.known else None


@dataclass(frozen=True)
class Curve:
    """The points of jobs that differ in learning rate and seed alone, by learning rate; values: of what else varied."""

    values: tuple[str, ...]
    points: list[Point]

    @property
    def best(self) -> Point | None:
        """The point of the lowest mean; None where no learning rate gets below l0."""
        limit = math.inf if self.points[0].start is None else self.points[0].start
        means = [(point.mean, point.rate, point) for point in self.points if point.mean is not None]
        return min((found for found in means if found[0] < limit), default=(0.0, 0.0, None))[2]

    def sensitivities(self) -> list[float]:
        """The LR sensitivity of each seed that has a loss at every learning rate; none where l0 is not known."""
        start = self.points[0].start
        if start is None:
            return []
        seeds = dict.fromkeys(seed for point in self.points for seed in point.losses)
        columns = [[point.losses.get(seed) for point in self.points] for seed in seeds]
        return [lr_sensitivity(column, start) for column in columns if None not in column]  # type: ignore[arg-type]

    @property
    def missing(self) -> int:
        return sum(loss is None for point in self.points for loss in point.losses.values())


def write(directory: Path, jobs: Sequence[Job], key: str) -> list[Any]:
    """Writes the three files below a sweep's directory; returns what the terminal shows: a table, and lines."""
    groups = [name for name in varied(job["overrides"] for job in jobs) if name not in (key, SEED)]
    found = curves(jobs, key, groups)
    _csv(directory / "lr_sensitivity.csv", found, groups)
    write_text(directory / "lr_sensitivity.md", _markdown(directory, found, groups))
    shown: list[Any] = [_table(found, groups)]
    if any(point.known or point.diverged for curve in found for point in curve.points):
        shown.append(f"figure {draw(directory / 'lr_sensitivity.png', found, groups, key)}")
    return [*shown, *_notes(found)]


def curves(jobs: Sequence[Job], key: str, groups: Sequence[str]) -> list[Curve]:
    """One curve for each combination of values of `groups`, in the order of the jobs; `key` holds the learning rate."""
    found: dict[tuple[str, ...], dict[float, dict[str, float | None]]] = {}
    starts: dict[tuple[str, ...], float | None] = {}
    for job in jobs:
        words = dict(word.partition("=")[::2] for word in job["overrides"])
        values = tuple(words.get(name, "") for name in groups)
        rate = found.setdefault(values, {}).setdefault(float(words[key]), {})
        rate[words.get(SEED, "")] = _loss(job)
        starts[values] = starts.get(values) or start(job)
    return [
        Curve(values, [Point(rate, losses, starts[values]) for rate, losses in sorted(rates.items())])
        for values, rates in found.items()
    ]


def _loss(job: Job) -> float | None:
    if job["status"] == "diverged":
        return math.nan
    return job.get("metrics", {}).get(METRIC) if job["status"] == "finished" else None


def start(job: Job) -> float | None:
    """l0 of a job that has begun: the logarithm of the number of answers in its config.yaml; None where it has none."""
    try:
        data = yaml.safe_load(Path(job["dir"], "config.yaml").read_text(encoding="utf-8"))["data"]
        return next(math.log(data[name]) for name in STARTS if isinstance(data.get(name), int) and data[name] > 1)
    except (OSError, KeyError, TypeError, AttributeError, StopIteration, ValueError, yaml.YAMLError):
        return None


# --- as text -------------------------------------------------------------------------------------------------------


def _csv(path: Path, found: Sequence[Curve], groups: Sequence[str]) -> None:
    """A row per point; what belongs to the whole curve is repeated in each of its rows."""
    header = [*groups, "lr", "seeds", "diverged", "above_start", "missing", METRIC, "min", "max", "loss_at_start"]
    rows = []
    for curve in found:
        numbers = curve.sensitivities()
        whole = [_mean(numbers), curve.best and curve.best.rate]
        for point in curve.points:
            known = point.known
            ends = [min(known), max(known)] if known else [None, None]
            missing = sum(loss is None for loss in point.losses.values())
            row = [point.rate, len(point.losses), point.diverged, point.above, missing, point.mean, *ends, point.start]
            rows.append([*curve.values, *row, *whole])
    write_csv(path, [*header, "lr_sensitivity", "best_lr"], rows)


HEAD = ["best lr", METRIC, "range over seeds", "diverged", "above l0", "LR sensitivity", "range over seeds"]


def _rows(found: Sequence[Curve]) -> list[list[str]]:
    rows = []
    for curve in found:
        best, numbers = curve.best, curve.sensitivities()
        runs = sum(len(point.losses) for point in curve.points) - curve.missing
        rows.append(
            [
                *(curve.values or ["all jobs"]),
                "" if best is None else f"{best.rate:g}",
                "" if best is None else f"{best.mean:.4f}",
                _range(best.known) if best else "",
                f"{sum(point.diverged for point in curve.points)} of {runs}",
                str(sum(point.above for point in curve.points)),
                f"{_mean(numbers):.4f}" if numbers else "",
                _range(numbers),
            ]
        )
    return rows


def _markdown(directory: Path, found: Sequence[Curve], groups: Sequence[str]) -> str:
    names = list(groups) or ["group"]
    text = [
        f"# Learning rates of sweep {directory.name}",
        "",
        *markdown_table([*names, *HEAD], _rows(found), left=len(names)),
    ]
    text += ["", MEANING, "", *(f"- {note}" for note in _notes(found)), "## Final validation loss", ""]
    text += ["Mean over seeds, with what diverged or ended above l0 as l0; × so many of them diverged.", ""]
    rates = sorted({point.rate for curve in found for point in curve.points})
    rows = []
    for curve in found:
        there = {point.rate: point for point in curve.points}
        rows.append([*(curve.values or ["all jobs"]), *(_cell(there.get(rate)) for rate in rates)])
    text += markdown_table([*names, *(f"{rate:g}" for rate in rates)], rows, left=len(names))
    return "\n".join(text) + "\n\n![final loss against learning rate](lr_sensitivity.png)\n"


def _cell(point: Point | None) -> str:
    if point is None or (point.mean is None and not point.diverged):
        return ""
    mean = "" if point.mean is None else f"{point.mean:.4f}"
    return f"{mean} ×{point.diverged}".strip() if point.diverged else mean


def _table(found: Sequence[Curve], groups: Sequence[str]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    made = Table(*(groups or ["group"]), *HEAD, title="learning rate", title_justify="left")
    for row in _rows(found):
        made.add_row(*map(escape, row))
    return made


def _notes(found: Sequence[Curve]) -> list[str]:
    """What keeps a number from being what the paper defines, a sentence each."""
    told = []
    for curve in found:
        name = " ".join(curve.values) or "all jobs"
        if curve.missing:
            told.append(f"{name}: {curve.missing} jobs have no final loss; their seeds are left out of LR sensitivity")
        elif curve.points[0].start is None:
            told.append(f"{name}: l0 is not known, as no config.yaml has data.vocab or data.classes; no LR sensitivity")
        rates = [math.log(point.rate) for point in curve.points]
        steps = [b - a for a, b in pairwise(rates)]
        if len(steps) > 1 and max(steps) > EVEN * min(steps):
            told.append(f"{name}: its learning rates are not evenly spaced in the logarithm, as LR sensitivity wants")
        if curve.best is not None and len(curve.points) > 1 and curve.best in (curve.points[0], curve.points[-1]):
            told.append(f"{name}: the best learning rate is at the end of the grid; a better one may lie beyond it")
    return told


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}" if len(values) > 1 else ""


# --- as a picture --------------------------------------------------------------------------------------------------


def draw(picture: Path, found: Sequence[Curve], groups: Sequence[str], key: str = "optimizer.lr") -> Path:
    """The curves with the range over seeds; crosses where runs diverged, a dashed line at l0."""
    starts = {curve.points[0].start for curve in found} - {None}
    with Canvas(
        1, width=9.6, height=6.4, heading="Final loss by learning rate", title=_subtitle(found, groups)
    ) as canvas:
        axes = canvas.axes[0]
        for number, curve in enumerate(found):
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            drawn = [point for point in curve.points if point.mean is not None]
            rates = [point.rate for point in drawn]
            axes.plot(rates, [p.mean for p in drawn], marker=marker, ms=8, color=colour, lw=2.2, label=_name(curve))  # type: ignore[arg-type]
            if any(len(point.known) > 1 for point in drawn):
                low, high = [min(p.known) for p in drawn], [max(p.known) for p in drawn]
                axes.fill_between(rates, low, high, color=colour, alpha=0.15, lw=0)
        for level in sorted(starts):  # type: ignore[type-var]
            axes.axhline(level, ls="--", lw=1.4, color=GREY, zorder=1)  # type: ignore[arg-type]
            axes.annotate(
                f"at initialization {level:.2f}", (0, level), xycoords=("axes fraction", "data"),  # type: ignore[arg-type]
                xytext=(4, -5), textcoords="offset points", va="top", color=GREY, size=13,
            )  # fmt: skip
        _crosses(axes, found)
        rates = [point.rate for curve in found for point in curve.points]
        axes.set_xscale("log")
        if max(rates) > min(rates):
            log_ticks(axes.xaxis, min(rates), max(rates))
        axes.set(xlabel=key.replace("optimizer.lr", "learning rate"), ylabel="final validation loss (nats)")
        axes.grid(axis="y")
        handles, names = axes.get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), handlelength=1.6)
        return canvas.save(picture)


def _crosses(axes: Any, found: Sequence[Curve]) -> None:
    """A cross on every point that runs diverged at; without l0 those have no height, and stand at the upper edge."""
    label: str | None = "diverged"
    for curve in found:
        for point in (point for point in curve.points if point.diverged):
            at = {} if point.mean is not None else {"transform": axes.get_xaxis_transform()}
            height = 0.98 if point.mean is None else point.mean
            axes.plot(
                [point.rate],
                [height],
                "x",
                color=RED,
                ms=13,
                mew=2.6,
                ls="",
                label=label,
                zorder=5,
                clip_on=False,
                **at,
            )
            label = None


def _name(curve: Curve) -> str:
    numbers = curve.sensitivities()
    name = " ".join(curve.values) or "all jobs"
    return f"{name} ({_mean(numbers):.3f})" if numbers else name


def _subtitle(found: Sequence[Curve], groups: Sequence[str]) -> str:
    seeds = max(len(point.losses) for curve in found for point in curve.points)
    parts = [f"by {', '.join(groups)}"] if groups else []
    parts += [f"mean and range of {seeds} seeds"] if seeds > 1 else []
    parts += ["in brackets: LR sensitivity, lower is steadier"] if any(curve.sensitivities() for curve in found) else []
    return " · ".join(parts)
