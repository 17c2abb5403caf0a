"""The accuracies of a stream of tasks as a heat map: each task after each other."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.report.canvas import INK, MAP, Canvas, write_csv

CELL = 0.78  # inches; a number of three digits and a point fits in
ANNOTATED = 20  # tasks up to which every cell has its number


def read(path: str | Path) -> np.ndarray:
    """R of an accuracy_matrix.csv, (T, T): a row per task trained, a column per task evaluated; empty: NaN.

    The first column numbers the rows, the first line names the columns. ValueError where the rest is no such matrix.
    """
    with Path(path).open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    try:
        R = np.array([[float(cell) if cell else math.nan for cell in line[1:]] for line in lines])
    except ValueError as error:
        raise ValueError(f"{path} is no matrix of accuracies: {error}. Restore the file, or delete it") from None
    if R.ndim != 2 or R.shape[0] != R.shape[1] or not R.size:
        raise ValueError(
            f"{path} should have as many rows as columns of tasks; got {R.shape}. Restore it, or delete it"
        )
    return R


def heatmap(path: str | Path, folder: Path, title: str) -> Path:
    """R from the run's accuracy_matrix.csv, shares, drawn in per cent; accuracy_matrix.png and .csv.

    Beside it, over the same colours, what the network knew of the tasks seen so far: the mean over k <= t of R[t, k].
    """
    R = read(path)
    tasks = len(R)
    seen = [row[: t + 1].mean() for t, row in enumerate(R)]
    header = ["trained", *(f"task_{k}" for k in range(tasks)), "mean_of_seen"]
    numbers = ([t, *map(_cell, R[t]), _cell(seen[t])] for t in range(tasks))
    write_csv(folder / "accuracy_matrix.csv", header, numbers)

    size = min(max(CELL * tasks, 3.2), 0.62 * ANNOTATED)
    with Canvas(
        2,
        width=size * (1 + 1 / tasks) + 3.4,
        height=size + 2.3,
        heading="Accuracy by task",
        title=title,
        sharey=True,
        width_ratios=[tasks, 1],
    ) as canvas:
        matrix, strip = canvas.axes
        mesh = _paint(matrix, 100 * R)
        _paint(strip, 100 * np.array(seen)[:, None])
        step = -(-tasks // ANNOTATED)
        names = [str(k + 1) for k in range(tasks)]
        matrix.set_xticks(range(0, tasks, step), names[::step])
        matrix.set_yticks(range(0, tasks, step), names[::step])
        matrix.set(xlabel="accuracy on task", ylabel="after training task")
        strip.set_xticks([0], ["mean of\nseen"])
        strip.tick_params(left=False, labelleft=False)
        bar = canvas.figure.colorbar(mesh, ax=canvas.axes, pad=0.03, aspect=max(22, 3 * size))
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label("accuracy (%)")
        return canvas.save(folder / "accuracy_matrix.png")


def _paint(axes: Any, percent: np.ndarray) -> Any:
    """Coloured cells from 0 to 100 with their numbers; what was not measured stays blank."""
    mesh = axes.imshow(np.ma.masked_invalid(percent), cmap=MAP, vmin=0, vmax=100, aspect="auto")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    if len(percent) <= ANNOTATED:
        text = "{:.1f}" if len(percent) <= 10 else "{:.0f}"
        for (row, column), value in np.ndenumerate(percent):
            if math.isfinite(value):
                ink = INK if value > 50 else "white"  # the map's middle, where both are legible
                axes.text(column, row, text.format(value), ha="center", va="center", color=ink, size=15)
    return mesh


def _cell(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
