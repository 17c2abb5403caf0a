"""`python -m trainkit.report figure DIR METRIC …`: metrics of a sweep by step, as PNG and CSV, for a paper.

  python -m trainkit.report figure logs/gpt/<sweep> val/loss grad_norm/global
  python -m trainkit.report figure logs/cnn/<sweep> effective_lr/mean --log --out nap.png

A line per group of runs that differ in their seed alone: the mean, with its 95 % interval over seeds as a shade.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainkit.report.canvas import Canvas, log_ticks, whole_ticks, write_csv
from trainkit.report.collect import Collection, collect
from trainkit.report.curves import lines
from trainkit.report.findings import Group, find
from trainkit.report.wording import title, unit

# Okabe and Ito's colours, told apart with every kind of colour vision; dashes once they have been used up.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222"]
DASHES = ["-", "--", "-.", ":"]


def main(argv: list[str]) -> int:
    """Returns the exit code, 2 for the user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m trainkit.report figure", description=__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a sweep or a run")
    parser.add_argument("metrics", nargs="+", metavar="METRIC", help="as in metrics.jsonl, a panel each")
    parser.add_argument("--log", action="store_true", help="logarithmic values")
    parser.add_argument("--out", type=Path, help="the picture; default: <DIR>/report/<METRIC>.png")
    options = parser.parse_args(argv)
    name = "_".join(metric.replace("/", "_") for metric in options.metrics)
    picture = options.out or options.directory / "report" / f"{name}.png"
    try:
        if picture.suffix != ".png":
            raise ValueError(f"the picture is a PNG; got --out {picture}. Try --out {picture.with_suffix('.png')}")
        draw(collect(options.directory), options.metrics, picture, log=options.log)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(picture)
    return 0


def draw(found: Collection, metrics: Sequence[str], picture: Path, *, log: bool = False) -> Path:
    """One panel per metric; ValueError where nobody logged it, naming what there is."""
    known = {name for run in found.runs for name in run.series}
    for name in metrics:
        if name not in known:
            near = sorted(other for other in known if other.split("/")[0] == name.split("/")[0]) or sorted(known)
            raise ValueError(f"no run here logged {name!r}. Try {', '.join(near[:8]) or 'another directory'}")
    groups = find(found.runs).groups
    write_csv(picture.with_suffix(".csv"), ["group", "metric", "step", "mean", "ci95", "runs"], _rows(groups, metrics))
    width = 9.0 if len(metrics) == 1 else 6.5 * len(metrics)
    heading = ", ".join(dict.fromkeys(title(name).partition(" · ")[0] for name in metrics))
    with Canvas(len(metrics), width=width, height=5.8, heading=heading, title=found.title) as canvas:
        for axes, name in zip(canvas.axes, metrics, strict=True):
            values = []
            for one in lines(groups, name):
                colour, dash = COLOURS[one.group % len(COLOURS)], DASHES[one.group // len(COLOURS) % len(DASHES)]
                axes.plot(one.steps, one.mean, dash, color=colour, lw=2.4, label=groups[one.group].label)
                low, high = one.mean - one.half, one.mean + one.half
                axes.fill_between(one.steps, low, high, color=colour, alpha=0.16, lw=0)
                values.append(one.mean)
            of_unit = f" ({unit(name)})" if unit(name) else ""
            kind, _, where = title(name).partition(" · ")
            axes.set(xlabel="optimizer step", ylabel=f"{kind}{of_unit}", title=where)
            axes.grid(axis="y")
            whole_ticks(axes.xaxis)
            positive = np.concatenate(values)
            positive = positive[np.isfinite(positive) & (positive > 0)]
            if log and len(positive):
                axes.set_yscale("log")
                axes.set_ylim(positive.min() / 1.2, positive.max() * 1.2)
                log_ticks(axes.yaxis, positive.min() / 1.2, positive.max() * 1.2)
        handles, names = canvas.axes[0].get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside lower center", ncols=min(2, len(names)), handlelength=1.6)
        return canvas.save(picture)


def _rows(groups: Sequence[Group], metrics: Sequence[str]) -> list[list[object]]:
    """Every number of the picture."""
    return [
        [groups[one.group].label, name, *numbers]
        for name in metrics
        for one in lines(groups, name)
        for numbers in zip(one.steps.tolist(), one.mean.tolist(), one.half.tolist(), one.runs.tolist(), strict=True)
    ]
