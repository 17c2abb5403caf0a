"""The figures of one run, from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from trainkit.report import accuracy_matrix, angular_distance, layers, plasticity
from trainkit.report.canvas import Canvas, whole_ticks, write_csv
from trainkit.report.deletion import deletion
from trainkit.report.hidden import hidden
from trainkit.report.learning_rate import learning_rate
from trainkit.report.metrics_file import Row, read, series

BLUE, ORANGE = "#4c78a8", "#d9541e"


def draw(metrics: str | Path, folder: str | Path, title: str = "") -> list[Path]:
    """Draws into `folder` what the metrics file has the numbers for, with a .csv beside each; returns the pictures.

    loss.png and learning_rate.png; where gradient norms were logged also grad_norm_heatmap.png and
    grad_norm_profile.png; where weight norms were, weights.png; where activations were looked at, hidden_variance.png
    and deletion.png; where accuracy_matrix.csv or angular_distance.csv stand beside the metrics file, a picture of it.
    """
    rows, folder, run = read(metrics), Path(folder), Path(metrics).parent
    pictures = [loss(rows, folder, title)] if any("train/loss" in row or "val/loss" in row for row in rows) else []
    if any("lr" in row for row in rows):
        pictures.append(learning_rate(rows, folder, title))
    by_layer = layers.collect(rows)
    if by_layer is not None:
        pictures += [layers.heatmap(by_layer, rows, folder, title), layers.profile(by_layer, rows, folder, title)]
    by_panel = plasticity.collect(rows)
    if by_panel is not None:
        pictures.append(plasticity.weights(by_panel, rows, folder, title))
    pictures += [picture for picture in (hidden(rows, folder, title), deletion(rows, folder, title)) if picture]
    for name, picture_of in (
        ("accuracy_matrix", accuracy_matrix.heatmap),
        ("angular_distance", angular_distance.matrix),
    ):
        table = run / f"{name}.csv"
        if table.is_file():
            pictures.append(picture_of(table, folder, title))
    return pictures


def loss(rows: list[Row], folder: Path, title: str) -> Path:
    """Training and validation loss by step; loss.png and loss.csv."""
    names = ("train/loss", "val/loss")
    kept = [row for row in rows if any(name in row for name in names)]
    write_csv(folder / "loss.csv", ["step", *names], ([row["step"], *(row.get(n) for n in names)] for row in kept))
    with Canvas(1, width=9, height=5.4, heading="Loss", title=title) as canvas:
        axes = canvas.axes[0]
        axes.plot(*series(rows, "train/loss"), color=BLUE, lw=1.6, label="training")
        steps, values = series(rows, "val/loss")
        axes.plot(steps, values, "-o", color=ORANGE, lw=2.5, ms=7, mec="white", label="validation")
        if values:
            axes.annotate(
                f"{values[-1]:.3f}",
                (steps[-1], values[-1]),
                (0, 10),
                textcoords="offset points",
                ha="center",
                color=ORANGE,
            )
        axes.set(xlabel="optimizer step", ylabel="loss (nats)")
        axes.grid(axis="y")
        axes.legend()
        whole_ticks(axes.xaxis)
        return canvas.save(folder / "loss.png")
