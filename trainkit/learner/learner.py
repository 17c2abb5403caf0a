"""The interface of learners on a stream of tasks: what a batch is trained on, and what is kept from earlier tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainkit.continual.strategy import Strategy


class Batch(NamedTuple):
    """Samples of a stream. x: (B, C, H, W), float, augmented and standardized; labels, task_ids: (B,), int64;
    raw: (B, C, H, W), uint8, the same images before both, which is what a buffer stores."""

    x: Tensor
    labels: Tensor
    task_ids: Tensor
    raw: Tensor


@dataclass(frozen=True)
class Stream:
    """What a learner may know of where its batches come from.

    classes_of: the classes of each task, after re-mapping; tasks may share them (domain-incremental).
    transform: (raw images, generator) -> what a training batch's x is made of, augmented anew.
    """

    tasks: int
    classes: int
    classes_of: list[list[int]]
    transform: Callable[[Tensor, torch.Generator], Tensor]
    seed: int = 0
    rank: int = 0
    world: int = 1


class Learner:
    """(model, batch, loss) -> what is differentiated, and what is logged; the events of a stream of tasks around it.

    The task owns the step, the optimizer and the log; a learner never sees the trainer. It is no module: what it holds
    (buffers of samples, teachers, importances) is neither optimized nor made equal over the ranks, and is saved by
    `state_dict`, one per rank. `loss` is the task's own: (model, batch) -> the mean loss over it.
    """

    stream: Stream
    strategy: Strategy
    remembers_batches = False  # each call leaves something behind, so a batch must not be repeated
    joins_late = True  # whether it can take over a stream that another learner began
    mixes = False  # whether it makes sense on a stream whose tasks are shuffled together

    def begin(self, stream: Stream, strategy: Strategy) -> None:
        """Called once, before training and before a state is loaded."""
        self.stream, self.strategy = stream, strategy

    def __call__(
        self, model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, 0-d, and further 0-d tensors to log by name."""
        raise NotImplementedError

    def begin_task(self, model: nn.Module, task: int) -> None:
        """Task number `task` of the stream starts."""

    def end_task(self, model: nn.Module, task: int, loader: Iterable[Batch]) -> None:
        """Task number `task` has ended; loader: its training samples, once, without augmentation."""

    def logits(self, model: nn.Module, x: Tensor, task_ids: Tensor) -> Tensor:
        """A training forward, announced to the strategy; in at least float32."""
        self.strategy.begin_batch(model, task_ids)
        out = model(x)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


def of_stream(batch: Any) -> Batch:
    """The batch, if it says to which task each of its samples belongs. ValueError if not."""
    if not isinstance(batch, Batch) or batch.task_ids is None or batch.task_ids.shape != batch.labels.shape:
        raise ValueError(
            "this learner needs batches with a task id for each sample and the raw images; the data give none. "
            "Try data=split_digits task=continual"
        )
    return batch
