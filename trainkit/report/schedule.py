"""`python -m trainkit.report schedule WORDS`: the learning rate by step, drawn before the run.

WORDS are those of run.py; lists of values are compared in one picture:
  python -m trainkit.report schedule schedule=cosine schedule.warmup=0.1 trainer.max_steps=5000
  python -m trainkit.report schedule schedule=linear,cosine,wsd optimizer.lr=3e-4
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from trainkit.launch.check import words
from trainkit.launch.explain import UserError
from trainkit.launch.planned import Planned, planned
from trainkit.launch.rundir import make
from trainkit.report.canvas import GREY, Canvas, whole_ticks, write_csv

POINTS = 20_000  # a longer run is drawn and written at so many evenly spaced steps
COLOURS = ["#4c78a8", "#d9541e", "#2f8f5b", "#8e5ea2", "#b8860b", "#17a2b8", "#c2477f", "#5f5f5f"]
DASHES = ["-", "--", "-.", ":"]  # another one each time the colours have been used up
LEGEND = 12  # more curves are not named in the picture; the CSV has them all


def main(argv: list[str]) -> int:
    """Writes PNG and CSV below paths.log_dir and prints where; returns the exit code, 2 for the user's mistake."""
    try:
        line = words.read(argv)
        if "help" in line.flags:
            print(__doc__)
            return 0
        if set(line.flags) - {"multirun"}:
            raise UserError("a schedule is drawn from settings, key=value, and takes no flags")
        plans = planned(line.overrides)
        folder = Path(plans[0].cfg.paths.log_dir) / "schedules"
        make(folder)
        for path in draw(plans, folder / f"{_name(plans)}.png"):
            print(path)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def draw(plans: Sequence[Planned], picture: Path) -> tuple[Path, Path]:
    """The curves in `picture`, and their numbers beside it: one column per curve, empty where its run has ended."""
    longest = max(plan.steps for plan in plans)
    steps = shown(longest)
    numbers = picture.with_suffix(".csv")
    rates = [[plan.rate(step) if step <= plan.steps else None for step in steps] for plan in plans]
    names = [f"lr {plan.label}" if len(plans) > 1 else "lr" for plan in plans]
    write_csv(numbers, ["step", *names], zip(steps, *rates, strict=True))

    with Canvas(1, width=9, height=5.4, heading="Learning rate", title=_title(plans)) as canvas:
        axes = canvas.axes[0]
        for number, (plan, rate) in enumerate(zip(plans, rates, strict=True)):
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
            drawn = [value for value in rate if value is not None]
            axes.plot(steps[: len(drawn)], drawn, dash, color=colour, lw=2.5, label=plan.label)
        axes.set(xlabel="optimizer step", ylabel="learning rate")
        axes.set_xlim(min(1, longest - 1), longest)
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        axes.yaxis.get_offset_text().set_color(GREY)
        axes.grid(axis="y")
        whole_ticks(axes.xaxis)
        if 1 < len(plans) <= LEGEND:
            handles, names = axes.get_legend_handles_labels()
            canvas.figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(plans)), handlelength=1.4)
        return canvas.save(picture), numbers


def shown(steps: int) -> list[int]:
    """The steps from 1 to `steps`, or POINTS of them."""
    if steps <= POINTS:
        return list(range(1, steps + 1))
    return [1 + number * (steps - 1) // (POINTS - 1) for number in range(POINTS)]


def _title(plans: Sequence[Planned]) -> str:
    """What all curves have in common."""
    names = {str(plan.cfg.choices.schedule) for plan in plans}
    peaks, lengths = {f"peak {plan.peak:g}" for plan in plans}, {f"{plan.steps:,} steps" for plan in plans}
    return " · ".join(found.pop() for found in (names, peaks, lengths) if len(found) == 1)


def _name(plans: Sequence[Planned]) -> str:
    """A file name from the labels, the same for the same words."""
    return re.sub(r"[^\w.=-]+", "_", "_".join(plan.label for plan in plans))[:120].strip("_")
