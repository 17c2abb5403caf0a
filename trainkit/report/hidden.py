"""How the hidden states grow with depth, and over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from trainkit.report.by_block import ByBlock, collect_kinds, name_places, write_looks
from trainkit.report.canvas import MAP, Canvas, log_ticks
from trainkit.report.layers import chosen_steps
from trainkit.report.metrics_file import Row

PANELS = {"hidden_variance": "variance over channels", "hidden_max": "largest |h|"}
MARKERS = "osD^"  # told apart without colour, too


def hidden(rows: list[Row], folder: Path, title: str) -> Path | None:
    """Variance and largest activation by depth, at the first look, at 10 % and 50 % of the run and at the last.

    hidden_variance.png, and hidden_variance.csv with all looks; None where no block's variance was logged.
    """
    found = collect_kinds(rows, PANELS)
    if "hidden_variance" not in found:
        return None
    write_looks(folder / "hidden_variance.csv", rows, found)
    with Canvas(
        len(found), width=1.6 + 5.4 * len(found), height=5.6, title=title, heading="Hidden states by depth"
    ) as canvas:
        for axes, (kind, one) in zip(canvas.axes, found.items(), strict=True):
            _profile(axes, one)
            axes.set_title(PANELS[kind])
        canvas.axes[0].set_ylabel("variance (activation units²)")
        if len(found) > 1:
            canvas.axes[1].set_ylabel("|h| (activation units)")
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1.6)
        return canvas.save(folder / "hidden_variance.png")


def _profile(axes: Any, one: ByBlock) -> None:
    import matplotlib

    chosen = chosen_steps(one.steps)
    shades = matplotlib.colormaps[MAP](np.linspace(0.86, 0.0, len(chosen)))
    values = np.where(np.isfinite(one.values) & (one.values > 0), one.values, np.nan)  # what has a logarithm
    for k, shade, marker in zip(chosen, shades, MARKERS, strict=False):
        style = {"color": shade, "marker": marker, "lw": 2.5, "ms": 7, "mec": "white"}
        axes.plot(np.arange(len(one.places)), values[:, k], label=f"step {one.steps[k]:,}", **style)
    drawn = values[:, chosen]
    drawn = drawn[np.isfinite(drawn)]
    low, high = (drawn.min() / 1.3, drawn.max() * 1.3) if len(drawn) else (0.1, 1.0)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    log_ticks(axes.yaxis, low, high)
    axes.grid(axis="y")
    name_places(axes.xaxis, one.names())
