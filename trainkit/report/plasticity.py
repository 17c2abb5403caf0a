"""The size of a run's weights and what its learning rate amounts to, over the steps, layer by layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.report.canvas import GREY, INK, MAP, Canvas, log_ticks, whole_ticks, write_csv
from trainkit.report.metrics_file import Row

PANELS = {"weight_norm": "weight norm ‖W‖", "effective_lr": "effective learning rate"}
DOTTED = 15  # measured steps up to which each has a dot
NAMED = 6  # layers up to which each has its name in the legend


def collect(rows: list[Row]) -> dict[str, list[str]] | None:
    """{panel: the layers it has curves of, in the network's order}, or None where no layer's weight was measured."""
    found = {
        panel: list(
            dict.fromkeys(
                name.removeprefix(f"{panel}/")
                for row in rows
                for name in row
                if name.startswith(f"{panel}/") and name != f"{panel}/mean"
            )
        )
        for panel in PANELS
    }
    return {panel: layers for panel, layers in found.items() if layers} or None


def weights(panels: dict[str, list[str]], rows: list[Row], folder: Path, title: str) -> Path:
    """Weight norm and effective learning rate by step; weights.png and .csv.

    A line per layer, from the input's (dark) to the output's (light), and the geometric mean over layers, on
    logarithmic scales: a layer whose norm doubles under SGD loses three quarters of its learning rate.
    """
    names = [f"{panel}/{layer}" for panel, layers in panels.items() for layer in layers]
    logged = [row for row in rows if any(name in row for name in names)]
    write_csv(folder / "weights.csv", ["step", *names], ([row["step"], *map(row.get, names)] for row in logged))

    steps = np.array([row["step"] for row in logged])
    dots = "-o" if len(steps) <= DOTTED else "-"
    layers = list(dict.fromkeys(layer for found in panels.values() for layer in found))
    with Canvas(
        len(panels), width=1.8 + 6.2 * len(panels), height=5.8, heading="Size of the weights", title=title
    ) as canvas:
        import matplotlib

        shades = dict(zip(layers, matplotlib.colormaps[MAP](np.linspace(0.0, 0.9, len(layers))), strict=True))
        for axes, (panel, found) in zip(canvas.axes, panels.items(), strict=True):
            curves = np.array([[_positive(row.get(f"{panel}/{layer}")) for row in logged] for layer in found])
            few = len(found) <= NAMED
            for layer, curve in zip(found, curves, strict=True):
                label = layer if few else None
                axes.plot(steps, curve, dots, color=shades[layer], lw=2.2 if few else 1.6, ms=5, label=label)
            if not few:
                axes.plot(steps, _geometric_mean(curves), "-", color=INK, lw=3.5, label="geometric mean of the layers")
            _scale(axes, curves)
            axes.set_title(PANELS[panel])
            axes.set_xlabel("optimizer step")
            axes.grid(axis="y")
            whole_ticks(axes.xaxis, most=5)
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        if len(layers) > NAMED:
            _depth_bar(canvas, layers)
        canvas.figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), handlelength=1.4)
        return canvas.save(folder / "weights.png")


def _scale(axes: Any, curves: np.ndarray) -> None:
    """A logarithmic axis that holds at least a factor of two, so that a flat curve looks flat."""
    finite = curves[np.isfinite(curves)]
    low, high = (finite.min(), finite.max()) if len(finite) else (1.0, 1.0)
    room = max(1.1, math.sqrt(2 * low / high))
    low, high = low / room, high * room
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    log_ticks(axes.yaxis, low, high)


def _depth_bar(canvas: Canvas, layers: list[str]) -> None:
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    shades = ListedColormap(matplotlib.colormaps[MAP](np.linspace(0.0, 0.9, len(layers))))
    bar = canvas.figure.colorbar(ScalarMappable(Normalize(0, 1), shades), ax=canvas.axes, pad=0.02, aspect=24)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_ticks([0, 1], labels=["first\nlayer", "last\nlayer"])
    bar.ax.tick_params(length=0, labelcolor=GREY)


def _geometric_mean(curves: np.ndarray) -> np.ndarray:
    known = np.isfinite(curves)
    logs = np.where(known, np.log(np.where(known, curves, 1.0)), 0.0).sum(0)
    counts = known.sum(0)
    return np.where(counts, np.exp(logs / np.maximum(counts, 1)), math.nan)


def _positive(value: float | None) -> float:
    """What has a logarithm; anything else leaves a gap."""
    return value if value is not None and math.isfinite(value) and value > 0 else math.nan
