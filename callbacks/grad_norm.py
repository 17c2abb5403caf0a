"""Gradient norms per block and site."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from trainkit.measure.grad_norm import grad_norm
from trainkit.measure.sites import sites
from trainkit.task.base import Task


class GradNorm(Callback):
    """Logs grad_norm/blocks.3.attn, grad_norm/blocks.3, grad_norm/embed, …, grad_norm/global when a step is due.

    Measured between the last backward of the step and the gradient treatment, so after accumulation and averaging
    over ranks, and before clipping, which logs grad_norm/clipped itself.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self.sites = sites(pl_module.model)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: Any) -> None:  # type: ignore[override]
        if pl_module.due:
            pl_module.record({f"grad_norm/{site}": norm for site, norm in grad_norm(self.sites).items()})
