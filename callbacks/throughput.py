"""How fast a run trains."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from trainkit.plan.devices import HALF_PEAK, listed
from trainkit.task.base import Task


class Throughput(Callback):
    """Logs steps_per_second and, where the task knows its tokens, tokens_per_second, of the time since the last log.

    Validation and the writing of checkpoints do not count. mfu = tokens_per_second · FLOPs per token / (peak · ranks)
    is added where all three are known: half precision on a listed GPU; elsewhere it is left out rather than guessed.
    The first log only starts the clock. On a GPU it waits for the device just before the task fetches the step's
    metrics, which then has nothing left to wait for.
    """

    def __init__(self) -> None:
        self.peak: float | None = None
        self.first_step = self.last_step = 0
        self.tokens = 0  # of the steps since the last log, whose batches need not be equally large
        self.started: float | None = None  # when the interval began, moved on by every pause
        self.paused: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self.peak, self.started, self.paused = half_peak(trainer), None, None
        self.last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.paused is not None and self.started is not None:
            self.started += time.perf_counter() - self.paused
        self.paused = None

    def on_validation_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._pause(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Task, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        self._pause(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if trainer.global_step > self.last_step:
            self.last_step = trainer.global_step
            self.tokens += pl_module.tokens_per_step or 0
        if not pl_module.due:
            return
        now = _now(trainer)
        if self.started is not None:
            pl_module.record(self._rates(trainer, pl_module, now - self.started))
        self.started, self.first_step, self.tokens = now, trainer.global_step, 0

    def _pause(self, trainer: Trainer) -> None:
        self.paused = self.paused or _now(trainer)

    def _rates(self, trainer: Trainer, task: Task, seconds: float) -> dict[str, float]:
        rates = {"steps_per_second": (trainer.global_step - self.first_step) / seconds}
        if task.tokens_per_step is not None:
            rates["tokens_per_second"] = self.tokens / seconds
            if task.flops_per_token is not None and self.peak is not None:
                flops = rates["tokens_per_second"] * task.flops_per_token
                rates["mfu"] = flops / (self.peak * trainer.world_size)
        return rates


def half_peak(trainer: Trainer) -> float | None:
    """FLOP/s of one of the trainer's devices at its precision, or None where that is not known."""
    device = trainer.strategy.root_device
    if device.type != "cuda" or not str(trainer.precision).startswith(("bf16", "16")):
        return None
    return listed(torch.cuda.get_device_name(device), HALF_PEAK)


def _now(trainer: Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
