"""The angles between the hidden states of all pairs of layers, as a heat map."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from trainkit.report.by_block import FIRST, name_places
from trainkit.report.canvas import INK, MAP, Canvas, write_csv

ANNOTATED = 14  # layers up to which every cell has its number


def read(path: str | Path) -> tuple[list[str], np.ndarray]:
    """(layers, D) of an angular_distance.csv, D: (L, L) in units of pi. ValueError where it is no such matrix."""
    with Path(path).open(newline="") as file:
        lines = list(csv.reader(file))
    try:
        D = np.array([[float(cell) for cell in line[1:]] for line in lines[1:]])
    except ValueError as error:
        raise ValueError(f"{path} is no matrix of distances: {error}. Delete it, or run again") from None
    if not lines or D.shape != (len(lines[0]) - 1,) * 2 or not D.size:
        raise ValueError(f"{path} should have a row for each of its columns; got {D.shape}. Delete it, or run again")
    return lines[0][1:], D


def matrix(path: str | Path, folder: Path, title: str) -> Path:
    """D from the run's angular_distance.csv, as it was at the last look; angular_distance.png and .csv.

    Cell (l, m) is the mean angle between what layers l and m put out: a dark square along the diagonal is a stretch of
    blocks that hardly turn the hidden state. Drawn below the diagonal, as it is symmetric.
    """
    layers, D = read(path)
    write_csv(folder / "angular_distance.csv", ["layer", *layers], ([n, *r] for n, r in zip(layers, D, strict=True)))
    count = len(layers)
    names = [name if name == FIRST else name.removeprefix("blocks.") for name in layers]
    size = min(max(0.62 * count, 4.2), 10)
    below = np.ma.masked_where(np.triu(np.ones_like(D, dtype=bool)) | ~np.isfinite(D), D)
    top = float(below.max()) if below.count() else 0.5
    with Canvas(
        1, width=size + 3.4, height=size + 1.9, heading="Angle between layers", title=f"{title} · last look"
    ) as canvas:
        axes = canvas.axes[0]
        mesh = axes.imshow(below, cmap=MAP, vmin=0, vmax=top or 1.0)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        name_places(axes.xaxis, names, "output of layer")
        name_places(axes.yaxis, names, "output of layer")
        axes.set_xlim(-0.5, count - 1.5)  # nothing lies below the last one
        axes.set_ylim(count - 0.5, 0.5)
        if count <= ANNOTATED:
            for row, column in zip(*np.tril_indices(count, -1), strict=True):
                if np.isfinite(D[row, column]):
                    ink = INK if D[row, column] > 0.55 * top else "white"
                    text = f"{D[row, column]:.2f}".lstrip("0")
                    axes.text(float(column), float(row), text, ha="center", va="center", color=ink, size=13)
        bar = canvas.figure.colorbar(mesh, ax=axes, pad=0.03, aspect=24)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label("angle / π  (0.5: right angle)")
        return canvas.save(folder / "angular_distance.png")
