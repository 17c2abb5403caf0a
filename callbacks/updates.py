"""What the optimizer makes of the gradients, per block and site."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from trainkit.measure.grad_norm import gradients
from trainkit.measure.lengths import lengths, rms
from trainkit.measure.noise_scale import noise_scale
from trainkit.measure.sites import sites
from trainkit.measure.updates import copies, moments, parameter_norm, update_ratio
from trainkit.task.base import Task


class Updates(Callback):
    """When a step is due, logs per site, blocks.3.attn, blocks.3, embed, …, and global,

        grad_rms/<site>             sqrt(mean g²), before the gradient treatment; of grad_norm/<site>, by the size
        parameter_norm/<site>       ‖θ‖ after the step
        update_ratio/<site>         ‖θ' - θ‖ / ‖θ‖ of the whole step: optimizer, weight decay and projection
        exp_avg_rms/<site>, …       sqrt(mean s²) of every state s that the optimizer has, by the optimizer's own name
        gradient_noise/trace, gradient_noise/square, gradient_noise/scale      tr(Σ), |G|², tr(Σ)/|G|² in samples

    The noise compares the gradients of the step's micro-batches and ranks with their mean, so it is logged only where
    there are at least two of them; with noise=false it never is. Only parameters and their gradients are read, so it
    all works under compile, accumulation, mixed precision and DDP. A step that is due takes a copy of the weights and a
    few passes over them, and no waiting for the device; other steps cost nothing.
    """

    def __init__(self, *, noise: bool = True):
        self.noise = noise
        self._before: dict[str, list[Tensor]] = {}  # the weights that the step in progress starts from
        self._squares: list[Tensor] = []  # ‖·‖² of each parameter's gradient in each micro-batch of it
        self._capturing = False
        self._samples = 0  # of a micro-batch
        self._hooks: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        if stage == "fit" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError("callbacks.updates needs whole weights: one device, or trainer.strategy=ddp")

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self.sites = sites(pl_module.model)
        if self.noise:
            # Before it is accumulated, and before it is averaged over the ranks: the gradient of one micro-batch.
            parameters = [p for group in self.sites.values() for p in group]
            self._hooks = [p.register_hook(self._capture) for p in parameters]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._squares = []
            several = trainer.accumulate_grad_batches * trainer.world_size > 1
            self._capturing = bool(self._hooks) and several and pl_module.due_at(trainer.global_step + 1)
        if self._capturing:
            self._samples = len(batch if isinstance(batch, Tensor) else batch[0])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: Any) -> None:  # type: ignore[override]
        self._capturing = False
        if not pl_module.due:
            return
        found = {f"grad_rms/{site}": value for site, value in rms(gradients(self.sites)).items()}
        if self._squares:
            found |= {f"gradient_noise/{name}": value for name, value in self._noise(trainer).items()}
        pl_module.record(found)
        self._before = copies(self.sites)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if not self._before:
            return
        named = {
            "parameter_norm": parameter_norm(self.sites),
            "update_ratio": update_ratio(self._before, self.sites),
            **{f"{name}_rms": values for name, values in moments(self.sites, trainer.optimizers[0].state).items()},
        }
        self._before = {}
        pl_module.record({f"{kind}/{site}": value for kind, values in named.items() for site, value in values.items()})

    def on_train_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:  # type: ignore[override]
        self._release()

    def _noise(self, trainer: Trainer) -> dict[str, Tensor]:
        accumulated, ranks = trainer.accumulate_grad_batches, trainer.world_size
        # Lightning divides every micro-batch's loss by their number, and mixed precision multiplies it by its scale.
        small = torch.stack(self._squares).sum() * accumulated
        self._squares = []
        if trainer.scaler is not None:
            small = small / trainer.scaler._get_scale_async().square()  # type: ignore[union-attr]
        if ranks > 1:
            small = trainer.strategy.reduce(small, reduce_op="mean")
        big = lengths(gradients(self.sites))["global"].square()
        return noise_scale(small, big, samples=self._samples, batch=self._samples * accumulated * ranks)

    def _capture(self, gradient: Tensor) -> None:
        if self._capturing:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._squares.append(torch.linalg.vector_norm(gradient.detach(), dtype=wide).square())

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._squares, self._before = [], [], {}
