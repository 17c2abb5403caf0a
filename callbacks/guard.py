"""Stops a run whose loss is no number any more, or goes on without the step; says how far a loss stands out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from trainkit.launch.console import log
from trainkit.measure.gradient_norms import norms
from trainkit.measure.modes import evaluating
from trainkit.measure.origin import first_non_finite_output, non_finite
from trainkit.measure.shards import is_sharded, local
from trainkit.task.base import SkipStep, Task, by_rank

LEAST = 10  # losses that a score needs


class NonFiniteLoss(RuntimeError):
    """A loss or a gradient became NaN or infinite."""


class Guard(Callback):
    """Looks for a loss or a gradient that is no number, and logs train/loss_spike.

    on_non_finite="stop" raises NonFiniteLoss, "warn" says it once and goes on, both with the step, the loss, the first
    module whose output is not finite on that very batch, and the first layer, in the model's order, that has a
    non-finite gradient. "skip" does not take such a step: its gradients are dropped, weights and optimizer stay as they
    are, the model's buffers (copied before every step) become what they were, as running statistics would never get rid
    of a NaN; the schedule and the data go on. train/skipped_steps counts them, and `max_skips` of them in a row raise
    NonFiniteLoss.

    On the CPU every step is checked before it reaches the weights, its gradients too. Elsewhere that would wait for the
    device at every step: there the losses are only kept, and looked at before a validation, before a checkpoint, and
    when train/loss has been fetched to be logged. The step and the loss named are then still the first bad ones; the
    layer is that of the step in which it was noticed. A checkpoint is never made of weights that a bad loss reached.
    "skip" cannot look later, so it does wait, once per step, and all ranks skip what one of them must. Under
    trainer.precision=16-mixed infinite gradients are the loss scale's business, which skips the step itself.

    For the output that is not finite the batch goes through the model once more, before the step: on the CPU, and under
    "skip", the last of the step's micro-batches alone where that is not on the CPU. What only happened with the dropout
    drawn then may not be found; several ranks look in eval mode, as one alone must not wait for the others' statistics.
    Under trainer=fsdp no module is named, as a forward is everybody's there.

    train/loss_spike = (l - mean) / std, with l the loss of the step and mean and std (of a sample, with n - 1) those of
    the finite losses among the `window` steps before it: causal, 0 where they were all equal, from the 10th on; under
    several ranks the mean of their scores. Beyond about 6 a loss is a spike. Computed on the device.
    """

    def __init__(self, on_non_finite: str = "stop", max_skips: int = 10, window: int = 100):
        if on_non_finite not in ("stop", "skip", "warn"):
            raise ValueError(f"callbacks.guard.on_non_finite must be stop, skip or warn; got {on_non_finite!r}")
        if max_skips < 1:
            raise ValueError(f"callbacks.guard.max_skips must be at least 1; got {max_skips}")
        if window < LEAST:
            raise ValueError(f"callbacks.guard.window must be at least {LEAST} steps; got {window}")
        self.on_non_finite, self.max_skips, self.window = on_non_finite, max_skips, window
        # (step, loss) since the last look: kept, not computed with. Bounded, for runs that are hardly ever logged.
        self.losses: deque[tuple[int, Tensor]] = deque(maxlen=10_000)
        self.warned = False
        self.sharded = False
        self.skipped = self.in_a_row = 0
        self.batch: Any = None  # the micro-batch that the next loss is made of
        self.origin: str | None = None  # where the first value of the step that is no number came from
        self.before: Tensor | None = None  # the losses of the last `window` steps, in a ring; NaN where there was none
        self._saved: list[Tensor | None] = []  # a resumed run's rings, by rank: each rank has losses of its own

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self.parameters = list(pl_module.model.parameters())  # asking for them takes as long as looking at them
        self.sharded = any(is_sharded(p) for p in self.parameters)
        # Taken by the task, after a stream has told the model of a new task: that is not undone with the step.
        pl_module.keep_buffers = self.on_non_finite == "skip"
        if len(self._saved) == trainer.world_size:
            self.before = self._saved[trainer.global_rank]
        self._saved = []
        if self.before is None or len(self.before) != self.window:  # the window may have been changed
            self.before = torch.full((self.window,), math.nan)
        self.before = self.before.to(pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: Task, loss: Tensor) -> None:  # type: ignore[override]
        self.losses.append((pl_module.step, loss.detach()))
        if loss.is_cpu and self.origin is None and not self.warned and not math.isfinite(loss.item()):
            self.origin = origin(trainer, pl_module, self.batch, forward=not self.sharded)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: Any) -> None:  # type: ignore[override]
        if self.on_non_finite == "skip":
            self._skip(trainer, pl_module)
        elif pl_module.device.type == "cpu":
            self._look(pl_module, with_gradients=trainer.scaler is None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.batch = batch
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.origin = None
        if pl_module.due:  # still that of the step before, whose train/loss is on the host by now
            if math.isfinite(pl_module.metrics.get("train/loss", 0.0)):
                self.losses.clear()
            else:
                self._look(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if trainer.fit_loop._should_accumulate() or self.before is None:
            return
        step, loss = pl_module.step, pl_module.step_loss()
        if loss is not None:
            loss = loss.to(self.before.dtype)
            if pl_module.due and step > LEAST:
                pl_module.record({"train/loss_spike": spike(loss, self.before)})
            self.before[step % self.window] = loss
        if pl_module.due and self.on_non_finite == "skip":
            pl_module.record({"train/skipped_steps": float(self.skipped)})

    def on_validation_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._look(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Task, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        self._look(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "before": by_rank(self.before)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._saved = state_dict["before"]

    def _skip(self, trainer: Trainer, task: Task) -> None:
        """Raises SkipStep where the step in progress is bad on any rank."""
        kept = [loss for _, loss in self.losses]
        self.losses.clear()
        finite = torch.stack(kept).isfinite().all() if kept else torch.ones((), dtype=torch.bool, device=task.device)
        if trainer.scaler is None:
            finite = finite & finite_gradients(self.parameters)
        bad = (~finite).to(torch.float32)
        if trainer.world_size > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if not bool(bad):
            self.in_a_row = 0
            return
        for buffer, value in zip(task.model.buffers(), task.buffers_before, strict=True):
            buffer.copy_(value)
        if self.origin is None and kept and not bool(kept[-1].isfinite()):
            self.origin = origin(trainer, task, self.batch, forward=not self.sharded)
        layer = first_non_finite(task)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        value = float(torch.stack(kept).sum()) if kept else math.nan
        step = trainer.global_step + 1
        if self.in_a_row >= self.max_skips:
            raise NonFiniteLoss(
                f"{self.in_a_row} steps in a row were skipped, the last one {step}, where the loss is {value:g}; "
                f"{self._where(task, layer, noticed=step)}. Try a lower optimizer.lr or gradient=clip, or allow more: "
                "callbacks.guard.max_skips"
            )
        if self.in_a_row == 1 and trainer.is_global_zero:
            log.warning("step %d is skipped: the loss is %g; %s", step, value, self._where(task, layer, noticed=step))
        if trainer.scaler is None:
            raise SkipStep

    def _look(self, task: Task, *, with_gradients: bool = False) -> None:
        kept = list(self.losses)
        self.losses.clear()
        if not kept or self.warned or self.on_non_finite == "skip":
            return
        values = torch.stack([loss for _, loss in kept]).tolist()
        bad = [(step, value) for (step, _), value in zip(kept, values, strict=True) if not math.isfinite(value)]
        step, value = bad[0] if bad else (kept[-1][0], values[-1])
        layer = (
            first_non_finite(task) if bad or (with_gradients and not bool(finite_gradients(self.parameters))) else None
        )
        if not bad and layer is None:
            return
        message = (
            f"the loss is {value:g} at step {step}; {self._where(task, layer, noticed=kept[-1][0])}. Try a lower "
            "optimizer.lr, a longer schedule.warmup or gradient=clip; callbacks.guard.on_non_finite=skip leaves such "
            "steps out, warn takes them"
        )
        if self.on_non_finite == "stop":
            raise NonFiniteLoss(message)
        log.warning("%s", message)
        self.warned = True

    def _where(self, task: Task, layer: str | None, noticed: int) -> str:
        first = "" if self.origin is None else f"first non-finite value: {self.origin}; "
        if layer is not None:
            return f"{first}the first layer with a non-finite gradient at step {noticed} is {layer}"
        if all(p.grad is None for p in task.model.parameters()):
            return f"{first}no gradient is there to say which layer it came from"
        return f"{first}no gradient is non-finite at step {noticed}"


def spike(loss: Tensor, before: Tensor) -> Tensor:
    """How many standard deviations a loss lies above the mean of the finite ones among those before it, 0-d."""
    if before.is_cpu:  # so few numbers take less time than the calls would
        known = [value for value in before.tolist() if math.isfinite(value)]
        if len(known) < 2:
            return torch.zeros_like(loss)
        mean = math.fsum(known) / len(known)
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
        return loss.new_tensor((float(loss) - mean) / std if std > 0 else 0.0)
    return spike_without_waiting(loss, before)


def spike_without_waiting(loss: Tensor, before: Tensor) -> Tensor:
    """The same on the device."""
    there = before.isfinite()
    number = there.sum()
    mean = torch.where(there, before, 0.0).sum() / number
    std = (torch.where(there, before - mean, 0.0).square().sum() / (number - 1)).sqrt()
    return torch.where(std > 0, (loss - mean) / std, 0.0)


def origin(trainer: Trainer, task: Task, batch: Any, *, forward: bool = True) -> str | None:
    """Where the first value came from that is not finite: the batch, a parameter, or the output of a module, or None.

    The batch is taken through the model once more, with the weights that there are; nothing but time is spent. With
    forward=False it is not, and no module is named.
    """
    if non_finite(batch):
        return "in the batch"
    for name, parameter in task.model.named_parameters():
        if non_finite(local(parameter)):
            return f"parameter {name}"
    if not forward:
        return None
    looking = evaluating(task) if trainer.world_size > 1 else nullcontext()
    with isolate_rng(), looking, trainer.precision_plugin.forward_context():
        name = first_non_finite_output(task.model, lambda: task.loss(task.model, batch))
    return None if name is None else f"output of {name}"


def first_non_finite(task: Task) -> str | None:
    """The name of the first of the model's parameters whose gradient is not finite, or None; of sharded ones, here."""
    for name, parameter in task.model.named_parameters():
        if parameter.grad is not None and not bool(local(parameter.grad).isfinite().all()):
            return name
    return None


def finite_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Whether all gradients are finite, on their device: by their largest entries, as squares could overflow. Of
    sharded ones only what this process holds, as the others may have found a reason of their own not to look.

    On a CPU, where that takes eight times as long as a sum of squares, only once one of those is not finite.
    """
    gradients = [g for g in (local(p.grad) for p in parameters if p.grad is not None) if g.numel()]
    if not gradients:
        return torch.ones((), dtype=torch.bool, device=parameters[0].device)
    if gradients[0].is_cpu and math.isfinite(norms(gradients).sum()):
        return torch.ones((), dtype=torch.bool)
    return torch.stack(torch._foreach_norm(gradients, float("inf"))).isfinite().all()
