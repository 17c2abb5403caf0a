"""The learning rate of a run, as its steps were made with it."""

from __future__ import annotations

from pathlib import Path

from trainkit.report.canvas import GREY, Canvas, whole_ticks, write_csv
from trainkit.report.metrics_file import Row, series

COLOURS = ["#4c78a8", "#d9541e", "#2f8f5b", "#8e5ea2"]  # of as many roles as parameters have
DASHES = ["-", "--", "-.", ":"]  # told apart without colour, too


def learning_rate(rows: list[Row], folder: Path, title: str) -> Path:
    """lr by step, or where roles have rates of their own lr/<role>, one line each; learning_rate.png and .csv."""
    names = list(dict.fromkeys(name for row in rows for name in row if name == "lr" or name.startswith("lr/")))
    kept = [row for row in rows if any(name in row for name in names)]
    write_csv(folder / "learning_rate.csv", ["step", *names], ([row["step"], *map(row.get, names)] for row in kept))
    drawn = [name for name in names if name != "lr"] or names
    with Canvas(1, width=9, height=5.4, heading="Learning rate", title=title) as canvas:
        axes = canvas.axes[0]
        for number, name in enumerate(drawn):
            steps, values = series(rows, name)
            colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
            axes.plot(steps, values, dash, color=colour, lw=2.5, label=name.removeprefix("lr/"))
        axes.set(xlabel="optimizer step", ylabel="learning rate (per optimizer step)")
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        axes.yaxis.get_offset_text().set_color(GREY)
        axes.grid(axis="y")
        if len(drawn) > 1:
            axes.legend()
        whole_ticks(axes.xaxis)
        return canvas.save(folder / "learning_rate.png")
