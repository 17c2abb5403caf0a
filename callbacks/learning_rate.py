"""The learning rate that a step is made with."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from trainkit.task.base import Task


class LearningRate(Callback):
    """Logs lr, that of the first parameter group; and lr/<role> for every group where they differ."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: Any) -> None:  # type: ignore[override]
        if pl_module.due:
            rates = {
                group.get("role", number): float(group["lr"]) for number, group in enumerate(optimizer.param_groups)
            }
            first = next(iter(rates.values()))
            differ = any(rate != first for rate in rates.values())
            pl_module.record({"lr": first} | ({f"lr/{role}": rate for role, rate in rates.items()} if differ else {}))
