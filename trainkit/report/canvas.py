"""What all figures share: their look, and the numbers as CSV beside each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, RED = "#222222", "#777777", "#d62728"
MAP = "viridis"  # even in lightness, and read alike with every kind of colour vision
STYLE = {
    "font.size": 15,
    "axes.titlesize": 16,
    "axes.labelsize": 15,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 14,
    "savefig.facecolor": "white",
}


class Canvas:
    """A figure of `panels` plots side by side, to be used as a context; it holds no global state of matplotlib.

    `heading` says what is shown, `title` of which run.
    """

    def __init__(self, panels: int, *, width: float, height: float, heading: str, title: str = "", **subplots: Any):
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        self._style = matplotlib.rc_context(STYLE)  # type: ignore[arg-type]
        self._style.__enter__()
        self.figure: Figure = Figure(figsize=(width, height), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.09))
        FigureCanvasAgg(self.figure)
        # Left-aligned with the axes' labels; a blank line in the title makes the room that the second line needs.
        self.figure.suptitle(f"{heading}\n", x=0.008, ha="left", va="top", size=19, weight="bold", linespacing=1.2)
        self.figure.text(0.008, 1 - 0.45 / height, title, ha="left", va="top", size=14, color=GREY)
        self.axes: list[Axes] = list(self.figure.subplots(1, panels, squeeze=False, **subplots)[0])

    def __enter__(self) -> Canvas:
        return self

    def __exit__(self, *_: object) -> None:
        self._style.__exit__(None, None, None)

    def save(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.figure.savefig(path)
        return path


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Numbers in full precision; None becomes an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def whole_ticks(axis: Any, most: int = 8) -> None:
    """At most so many ticks, at whole numbers; 20k for 20000."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value >= 10_000 else f"{value:g}"))


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis: powers of ten over a wide range, numbers between them too over a narrow one."""
    from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, NullFormatter, NullLocator

    decades = log10(high / low)
    subs = (1,) if decades > 3.2 else (1, 3) if decades > 1.5 else (1, 2, 5) if decades > 0.6 else range(1, 10)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_locator(LogLocator(subs=list(subs), numticks=9))
    axis.set_major_formatter(LogFormatterSciNotation() if decades > 3.2 or high < 1e-4 or low > 1e4 else plain)
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
