"""Gradient norms per block and site."""

from __future__ import annotations

from itertools import chain
from typing import Any

from lightning.pytorch import Callback, Trainer

from trainkit.measure.grad_norm import grad_norm, grad_norm_l1
from trainkit.measure.sites import sites
from trainkit.task.base import Task


class GradNorm(Callback):
    """Logs grad_norm/blocks.3.attn, grad_norm/blocks.3, grad_norm/embed, …, grad_norm/global when a step is due.

    All are L2 norms; grad_norm/global_l1 is the L1 norm of the whole gradient.

    Measured between the last backward of the step and the gradient treatment, so after accumulation and averaging
    over ranks, and before clipping, which logs grad_norm/clipped itself.
    """

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self.sites = sites(pl_module.model)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: Any) -> None:  # type: ignore[override]
        if pl_module.due:
            norms = grad_norm(self.sites) | {"global_l1": grad_norm_l1(chain(*self.sites.values()))}
            pl_module.record({f"grad_norm/{site}": norm for site, norm in norms.items()})
