"""What each block is worth: the loss without it, and how far it turns the hidden state."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trainkit.report.by_block import collect_kinds, name_places, write_looks
from trainkit.report.canvas import GREY, Canvas
from trainkit.report.metrics_file import Row

BLUE = "#4c78a8"
LAST, EARLY = {"color": BLUE, "marker": "o", "lw": 2.8}, {"color": GREY, "marker": "s", "lw": 1.6, "ls": "--"}
PANELS = {
    "deletion_drop": ("loss without the block", "rise of the validation loss (nats)"),
    "block_influence": ("block influence", "1 − cos(input, output)"),
}


def deletion(rows: list[Row], folder: Path, title: str) -> Path | None:
    """deletion_drop and block_influence by block, at the first look and the last; deletion.png and .csv (all looks).

    None where no block was left out.
    """
    found = collect_kinds(rows, PANELS)
    if "deletion_drop" not in found:
        return None
    write_looks(folder / "deletion.csv", rows, found)
    with Canvas(
        len(found), width=1.6 + 5.4 * len(found), height=5.6, title=title, heading="What each block is worth"
    ) as canvas:
        for axes, (kind, one) in zip(canvas.axes, found.items(), strict=True):
            at, values = np.arange(len(one.places)), np.where(np.isfinite(one.values), one.values, np.nan)
            axes.axhline(0, color=GREY, lw=1)
            for column, style in ((0, EARLY), (-1, LAST))[-len(one.steps) :]:
                label = f"step {one.steps[column]:,}"
                axes.plot(at, values[:, column], ms=7, mec="white", label=label, **style)
            heading, unit = PANELS[kind]
            axes.set_title(heading)
            axes.set_ylabel(unit)
            axes.grid(axis="y")
            name_places(axes.xaxis, one.names())
        handles, labels = canvas.axes[0].get_legend_handles_labels()
        canvas.figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), handlelength=1.8)
        return canvas.save(folder / "deletion.png")
