"""What a run shows as it starts and when it has ended."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from trainkit.launch.check.composition import select
from trainkit.launch.runconfig import plain
from trainkit.launch.summary import STAGES

if TYPE_CHECKING:
    from rich.table import Table
    from rich.tree import Tree

    from trainkit.launch.rundir import Run

OWN = ("paths", "choices", "requires", "experiment", "debug", "hparams_search")


def opening(cfg: DictConfig, run: Run, parameters: str) -> Tree:
    """The configuration as a tree, one line per choice: norm: peri (embed=True)."""
    from rich.tree import Tree

    tree = Tree(f"[bold]{'continuing' if run.resumed else 'run'}[/] {run.dir}")
    settings = plain(cfg)
    for group, option in cfg.choices.items():
        node = select(settings, group.replace("/", "."))
        if group not in OWN and option is not None:
            tree.add(f"[bold]{group}[/]: {option}{_inline(node)}")
    if cfg.get("to"):
        tree.add(f"[bold]to[/]: {cfg.to}")
    tree.add(f"[bold]parameters[/]: {parameters}")
    return tree


def _inline(node: Any) -> str:
    if not isinstance(node, dict):
        return ""
    pairs = [f"{k}={_short(v)}" for k, v in node.items() if v is not None and not isinstance(v, dict)]
    return f" [dim]({', '.join(pairs)})[/]" if pairs else ""


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value).replace("[", r"\[")
    return text if len(text) <= 40 else f"…{text[-38:]}"


def summary(cfg: DictConfig, run: Run, metrics: dict[str, float]) -> Table:
    """The closing screen: final metrics, the figures, and how to look at the run."""
    from rich.table import Table

    table = Table(title="finished", show_header=False, title_justify="left", min_width=60)
    table.add_column()
    table.add_column(overflow="fold")  # paths are there to be copied
    for name in sorted(metrics):
        if name.startswith(STAGES):
            table.add_row(name, f"{metrics[name]:.4f}")
    baseline = cfg.data.get("unigram_entropy")
    if baseline is not None and "val/loss" in metrics:
        gain = baseline - metrics["val/loss"]
        side = "below" if gain >= 0 else "above"
        table.add_row("val/loss lies", f"{abs(gain):.4f} nats/token {side} the unigram entropy, {baseline:.4f}")
    for figure in run.result.get("figures", []):
        table.add_row("figure", str(run.dir / figure))
    table.add_row("numbers", str(run.dir / "metrics.jsonl"))
    table.add_row("view", view_command(cfg, run.dir))
    return table


UNITS = {"loss": "nats", "perplexity": "exp(nats)", "bits_per_byte": "bits", "accuracy": "share"}


def scores(metrics: dict[str, float]) -> Table:
    """What an evaluation found: a row per measure, val/loss and test/loss side by side; then what has no such sets."""
    from rich.table import Table

    sets = [stage for stage in ("val", "test") if any(name.startswith(f"{stage}/") for name in metrics)]
    rows = dict.fromkeys(name.partition("/")[2] for name in metrics if name.partition("/")[0] in sets)
    table = Table("measure", title="evaluated", title_justify="left", min_width=60)
    for stage in sets:
        table.add_column(stage, justify="right")
    table.add_column("unit")
    for row in rows:
        values = (metrics.get(f"{stage}/{row}") for stage in sets)
        table.add_row(row, *("" if value is None else f"{value:.6g}" for value in values), UNITS.get(row, ""))
    for name in sorted(name for name in metrics if name.partition("/")[0] not in sets):
        table.add_row(name, f"{metrics[name]:.6g}")
    return table


def view_command(cfg: DictConfig, directory: Path) -> str:
    """What to type to see the run, with the logger that it used."""
    log_dir = Path(cfg.paths.log_dir)
    if cfg.choices.logger == "wandb":
        return f"wandb leet {log_dir / 'wandb'}      (to the web: wandb sync {log_dir / 'wandb'}/offline-run-*)"
    if cfg.choices.logger == "tensorboard":
        return f"tensorboard --logdir {directory}"
    return f"less {directory / 'metrics.jsonl'}"
