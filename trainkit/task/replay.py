"""A second gradient of the same step at other weights, for optimizers that need one."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainkit.task.base import Task


@dataclass
class Moment:
    """What a forward finds besides weights and batch: the states of torch's generators and the buffers."""

    generators: list[Tensor]
    buffers: list[Tensor]

    @classmethod
    def now(cls, task: Task) -> Moment:
        generators = [torch.get_rng_state()]
        if task.device.type != "cpu":
            generators.append(torch.get_device_module(task.device).get_rng_state())
        return cls(generators, [buffer.clone() for buffer in task.buffers()])

    def restore(self, task: Task) -> None:
        torch.set_rng_state(self.generators[0])
        if len(self.generators) > 1:
            torch.get_device_module(task.device).set_rng_state(self.generators[1])
        if self.buffers:
            torch._foreach_copy_(list(task.buffers()), self.buffers)


class Replay:
    """Makes the gradient of the step in progress again, at the weights as they then are.

    Every forward meets what it met the first time: its micro-batch, the random numbers of dropout, and the buffers.
    Afterwards generators and buffers are as the first pass left them, so running statistics, stateful norm layers and
    whatever else the model counts in buffers have seen the first pass only. Nothing of the second is logged but what
    the gradient treatment says, which is given the second gradient alone: the one that is stepped with. Under
    DDP both gradients are averaged over the ranks. Costs the memory of a step's micro-batches, and of the model's
    buffers for each.
    """

    def __init__(self, task: Task):
        self.task = task
        self.kept: list[tuple[Any, int, Moment]] = []
        self.repeated: Moment | None = None  # of the micro-batch whose second forward is about to run

    def note(self, batch: Any, batch_idx: int) -> bool:
        """Where a training step begins: keeps what it starts from, or puts it back. Whether this is the first pass."""
        if self.repeated is not None:
            self.repeated.restore(self.task)
            return False
        self.kept.append((batch, batch_idx, Moment.now(self.task)))
        return True

    def __call__(self) -> None:
        task, strategy = self.task, self.task.trainer.strategy
        quiet = getattr(strategy, "block_backward_sync", nullcontext)
        after = Moment.now(task)
        task.zero_grad()
        try:
            for place, (batch, batch_idx, moment) in enumerate(self.kept):
                self.repeated = moment
                task.before_micro_batch(place)
                with nullcontext() if place == len(self.kept) - 1 else quiet():
                    # Through the strategy, as DDP prepares its averaging in the forward of its wrapper.
                    loss = cast(Tensor, strategy.training_step(batch, batch_idx))
                    task.backward(loss / task.trainer.accumulate_grad_batches)
        finally:
            self.repeated = None
            self.kept.clear()
            after.restore(task)
        task.treat_gradient()
