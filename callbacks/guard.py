"""Stops a run whose loss is no number any more."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from trainkit.launch.console import log
from trainkit.task.base import Task


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient became NaN or infinite."""


class Guard(Callback):
    """Raises NonFiniteLoss, or warns once (on_non_finite="warn"), with the step, the loss and the first layer, in the
    model's order, that has a non-finite gradient.

    On the CPU every step is checked before it reaches the weights, its gradients too. Elsewhere that would wait for the
    device at every step: there the losses are only kept, and looked at before a validation, before a checkpoint, and
    when train/loss has been fetched to be logged. The step and the loss named are then still the first bad ones; the
    layer is that of the step in which it was noticed. A checkpoint is never made of weights that a bad loss reached.
    """

    def __init__(self, on_non_finite: str = "stop"):
        if on_non_finite not in ("stop", "warn"):
            raise ValueError(f"callbacks.guard.on_non_finite must be stop or warn; got {on_non_finite!r}")
        self.on_non_finite = on_non_finite
        # (step, loss) since the last look: kept, not computed with. Bounded, for runs that are hardly ever logged.
        self.losses: deque[tuple[int, Tensor]] = deque(maxlen=10_000)
        self.warned = False

    def on_before_backward(self, trainer: Trainer, pl_module: Task, loss: Tensor) -> None:  # type: ignore[override]
        self.losses.append((trainer.global_step + 1, loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: Any) -> None:  # type: ignore[override]
        if pl_module.device.type == "cpu":
            self._look(pl_module, with_gradients=trainer.scaler is None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if pl_module.due:  # still that of the step before, whose train/loss is on the host by now
            if math.isfinite(pl_module.metrics.get("train/loss", 0.0)):
                self.losses.clear()
            else:
                self._look(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._look(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Task, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        self._look(pl_module)

    def _look(self, task: Task, *, with_gradients: bool = False) -> None:
        kept = list(self.losses)
        self.losses.clear()
        if not kept or self.warned:
            return
        values = torch.stack([loss for _, loss in kept]).tolist()
        bad = [(step, value) for (step, _), value in zip(kept, values, strict=True) if not math.isfinite(value)]
        step, value = bad[0] if bad else (kept[-1][0], values[-1])
        layer = first_non_finite(task) if bad or (with_gradients and not _all_finite(task)) else None
        if not bad and layer is None:
            return
        message = (
            f"the loss is {value:g} at step {step}; {_where(task, layer, noticed=kept[-1][0])}. Try a lower "
            "optimizer.lr, a longer schedule.warmup or gradient=clip; callbacks.guard.on_non_finite=warn goes on"
        )
        if self.on_non_finite == "stop":
            raise NonFiniteLoss(message)
        log.warning("%s", message)
        self.warned = True


def first_non_finite(task: Task) -> str | None:
    """The name of the first of the model's parameters whose gradient is not finite, or None."""
    for name, parameter in task.model.named_parameters():
        if parameter.grad is not None and not bool(parameter.grad.isfinite().all()):
            return name
    return None


def _all_finite(task: Task) -> bool:
    """Whether the gradients are certainly finite; one pass, which may doubt finite ones whose squares overflow."""
    gradients = [p.grad for p in task.model.parameters() if p.grad is not None]
    return not gradients or bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())


def _where(task: Task, layer: str | None, noticed: int) -> str:
    if layer is not None:
        return f"the first layer with a non-finite gradient at step {noticed} is {layer}"
    if all(p.grad is None for p in task.model.parameters()):
        return "no gradient is there to say which layer it came from"
    return f"no gradient is non-finite at step {noticed}"
