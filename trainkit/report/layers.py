"""The gradient norms of a run by layer: as a heat map over the steps, and as a profile by depth."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.report.canvas import MAP, RED, Canvas, log_ticks, whole_ticks, write_csv
from trainkit.report.metrics_file import Row

PREFIX = "grad_norm/"
LABEL = re.compile(r"grad_norm/(?P<block>(?:.*\.)?blocks\.\d+)\.(?P<site>[^.]+)$")
COLUMNS = 400  # more steps than these are drawn as the largest of each bin
NAMES = {"attn": "attention weights", "mlp": "MLP weights", "norm": "norm gains", "residual": "residual scalars"}


@dataclass(frozen=True)
class Layers:
    """Norms by site: values[site] is (blocks, steps), NaN where nothing was logged, infinite where it is not finite."""

    steps: np.ndarray
    blocks: list[str]
    values: dict[str, np.ndarray]

    @property
    def weights(self) -> list[str]:
        """The sites that are sublayers' own weights; the others are vectors, of another magnitude."""
        return [site for site in self.values if site not in ("norm", "residual")]

    @property
    def others(self) -> list[str]:
        return [site for site in ("norm",) if site in self.values]

    def names(self) -> list[str]:
        """Blocks as people count them: 0, 1, …, or 1.0 for block 0 of stage 1."""
        return [".".join(re.findall(r"\d+", block)) for block in self.blocks]


def collect(rows: list[Row]) -> Layers | None:
    """The gradient norms by block and site, or None where none were logged."""
    rows = [row for row in rows if any(LABEL.match(name) for name in row)]
    labels = list(dict.fromkeys(name for row in rows for name in row if LABEL.match(name)))
    if not labels:
        return None
    parts = {label: LABEL.match(label).group("block", "site") for label in labels}  # type: ignore[union-attr]
    blocks = sorted(
        {block for block, _ in parts.values()}, key=lambda block: [int(n) for n in re.findall(r"\d+", block)]
    )
    sites = sorted({site for _, site in parts.values()}, key=lambda site: (site in ("norm", "residual"), site))
    values = {site: np.full((len(blocks), len(rows)), math.nan) for site in sites}
    for label, (block, site) in parts.items():
        values[site][blocks.index(block)] = [_value(row.get(label)) for row in rows]
    return Layers(np.array([row["step"] for row in rows]), blocks, values)


def heatmap(layers: Layers, rows: list[Row], folder: Path, title: str) -> Path:
    """Layer by step, one panel per site, colour the norm on a logarithmic scale; grad_norm_heatmap.png and .csv.

    The panels of weights share one scale, the norms' gains have another. It spans the middle 98 % of the values.
    """
    labels = list(dict.fromkeys(name for row in rows for name in row if name.startswith(PREFIX)))
    logged = [row for row in rows if any(label in row for label in labels)]
    table = ([row["step"], *(row.get(label) for label in labels)] for row in logged)
    write_csv(folder / "grad_norm_heatmap.csv", ["step", *labels], table)

    scales = [sites for sites in (layers.weights, layers.others) if sites]
    sites = [site for scale in scales for site in scale]
    height = min(4.3 + 0.12 * len(layers.blocks), 9)
    with Canvas(
        len(sites), width=2.2 + 4.2 * len(sites), height=height, sharey=True, title=title,
        heading="Gradient norm by layer and step",
    ) as canvas:  # fmt: skip
        panels = dict(zip(sites, canvas.axes, strict=True))
        edges, bins = _bins(layers.steps)
        for scale in scales:
            low, high = _span(np.concatenate([layers.values[site].ravel() for site in scale]))
            for site in scale:
                mesh = _paint(panels[site], edges, _largest(layers.values[site], bins), low, high)
                panels[site].set_title(NAMES.get(site, site))
                panels[site].set_xlabel("optimizer step")
            bar = canvas.figure.colorbar(mesh, ax=[panels[s] for s in scale], extend="both", pad=0.02, aspect=24)
            bar.outline.set_visible(False)
            bar.set_label("L2 norm of the gradient")
            log_ticks(bar.ax.yaxis, low, high)
            for site in scale:
                panels[site].tick_params(left=site == scale[0], labelleft=site == scale[0])
        _name_blocks(canvas.axes[0], layers, vertical=True)
        return canvas.save(folder / "grad_norm_heatmap.png")


def profile(layers: Layers, rows: list[Row], folder: Path, title: str) -> Path:
    """Norm by depth at the first step, at 10 % and 50 % of the run and at the last; grad_norm_profile.png and .csv."""
    chosen = chosen_steps(layers.steps)
    sites = [*layers.weights, *layers.others]
    drawn = set(layers.steps[chosen].tolist())
    table = (
        [row["step"], block, *(row.get(f"{PREFIX}{block}.{site}") for site in sites)]
        for row in rows
        if row["step"] in drawn
        for block in layers.blocks
    )
    write_csv(folder / "grad_norm_profile.csv", ["step", "block", *sites], table)

    with Canvas(
        len(sites), width=1.6 + 4.4 * len(sites), height=5.2, title=title, heading="Gradient norm by depth"
    ) as canvas:
        import matplotlib

        shades = matplotlib.colormaps[MAP](np.linspace(0.86, 0.0, len(chosen)))
        at = np.arange(len(layers.blocks))
        for axes, site in zip(canvas.axes, sites, strict=True):
            for k, shade in zip(chosen, shades, strict=True):
                values = _finite(layers.values[site][:, k])
                axes.plot(at, values, "-o", color=shade, lw=2.5, ms=7, mec="white", label=f"step {layers.steps[k]:,}")
            axes.set_yscale("log")
            axes.set_title(NAMES.get(site, site))
            axes.grid(axis="y")
            _name_blocks(axes, layers, vertical=False)
        for scale in (layers.weights, layers.others):
            low, high = _span(np.concatenate([layers.values[s][:, chosen].ravel() for s in scale] or [[]]), share=0)
            for site in scale:
                axes = canvas.axes[sites.index(site)]
                axes.set_ylim(low / 1.15, high * 1.15)
                log_ticks(axes.yaxis, low, high)
        canvas.axes[0].set_ylabel("L2 norm of the gradient")
        handles, names = canvas.axes[0].get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside lower center", ncols=len(chosen), handlelength=1.4)
        return canvas.save(folder / "grad_norm_profile.png")


def chosen_steps(steps: np.ndarray) -> list[int]:
    """The columns of the first logged step, those nearest to 10 % and 50 % of the run, and the last."""
    targets = [steps[0], 0.1 * steps[-1], 0.5 * steps[-1], steps[-1]]
    return sorted({int(np.abs(steps - target).argmin()) for target in targets})


def _bins(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(edges of the columns in steps, the first logged step of each): one column per logged step while they are few."""
    first = np.unique(np.linspace(0, len(steps), min(len(steps), COLUMNS), endpoint=False).astype(int))
    middles = (steps[first[1:]] + steps[first[1:] - 1]) / 2
    ends = steps[[0, -1]] if len(steps) > 1 else steps[[0, 0]] + np.array([-0.5, 0.5])
    return np.concatenate([ends[:1], middles, ends[1:]]), first


def _largest(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    return np.fmax.reduceat(values, bins, axis=1)


def _paint(axes: Any, edges: np.ndarray, values: np.ndarray, low: float, high: float) -> Any:
    """Draws (blocks, steps) as coloured cells; what was not logged stays blank, what is not finite is red."""
    from matplotlib.colors import ListedColormap, LogNorm

    rows = np.arange(values.shape[0] + 1) - 0.5
    shown = np.ma.masked_where(~np.isfinite(values), np.maximum(values, low / 2))  # zero has no logarithm
    mesh = axes.pcolormesh(edges, rows, shown, cmap=MAP, norm=LogNorm(low, high), rasterized=True)
    if np.isinf(values).any():
        broken = np.ma.masked_where(~np.isinf(values), np.ones_like(values))
        axes.pcolormesh(edges, rows, broken, cmap=ListedColormap([RED]), rasterized=True)
    axes.spines[:].set_visible(False)
    whole_ticks(axes.xaxis, most=4)
    return mesh


def _name_blocks(axes: Any, layers: Layers, *, vertical: bool) -> None:
    axis = axes.yaxis if vertical else axes.xaxis
    names = layers.names()
    axis.set_label_text("block  (input → output)")
    step = -(-len(names) // 12)
    axis.set_ticks(range(0, len(names), step), names[::step])


def _span(values: np.ndarray, share: float = 1.0) -> tuple[float, float]:
    """The range of a logarithmic scale: the positive finite values without `share` % at either end."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not len(positive):
        return 0.1, 1.0
    low, high = np.percentile(positive, [share, 100 - share])
    return (low, high) if high > 1.001 * low else (low / 1.5, high * 1.5)


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, math.nan)


def _value(logged: float | None) -> float:
    return math.nan if logged is None else logged if math.isfinite(logged) else math.inf
