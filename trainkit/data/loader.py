"""Iterables of batches: training from the trainer's position on, evaluation over fixed items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np
from lightning.pytorch import Trainer
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs and what is to be predicted


@dataclass(frozen=True)
class Share:
    """One process's part of an optimizer step; micro_batch: items per forward pass; pin: in page-locked memory."""

    micro_batch: int
    world: int = 1
    rank: int = 0
    accumulation: int = 1
    pin: bool = False

    @classmethod
    def of(cls, trainer: Trainer | None, batch_size: int) -> Share:
        """Raises ValueError where `batch_size` cannot be shared out evenly."""
        if trainer is None:
            return cls(batch_size)
        world, accumulation = trainer.world_size, trainer.accumulate_grad_batches
        micro_batch, left = divmod(batch_size, world * accumulation)
        if left:
            raise ValueError(
                f"data.batch_size={batch_size} must be a multiple of {world} processes x "
                f"trainer.accumulate_grad_batches={accumulation}; try {(micro_batch + 1) * world * accumulation}"
            )
        pin = trainer.strategy.root_device.type == "cuda"
        return cls(micro_batch, world, trainer.global_rank, accumulation, pin)

    def pinned(self, batch: Batch) -> Batch:
        return (batch[0].pin_memory(), batch[1].pin_memory()) if self.pin else batch


class Source(Protocol):
    """What batches are drawn from: so many items per epoch, in an order that follows from (seed, epoch) alone."""

    def __len__(self) -> int: ...

    def epoch(self, seed: int, epoch: int) -> Callable[[slice], Batch]:
        """What gives the batch at a stretch of that epoch's order."""
        ...


class TrainLoader:
    """The batches from the trainer's position to the end of its epoch.

    Optimizer step s of an epoch takes the items [s · batch_size, (s + 1) · batch_size) of the shuffled order; its
    micro-batch m on process r is the slice number m · world + r of them. Items that do not fill a step are left out.
    The position follows from trainer.global_step alone, so a resumed run goes on with the batch that was next; the
    state in a checkpoint is only compared with it.
    """

    def __init__(self, source: Source, share: Share, *, seed: int, trainer: Trainer | None = None):
        self.source, self.share, self.seed, self.trainer = source, share, seed, trainer
        self.steps = len(source) // (share.micro_batch * share.world * share.accumulation)
        self._saved: dict[str, int] | None = None

    def __len__(self) -> int:
        return self.steps * self.share.accumulation

    def __iter__(self) -> Iterator[Batch]:
        here = self.state_dict()
        if self._saved not in (None, here):
            raise ValueError(
                "a resumed run must keep its data, seed, data.batch_size and data.context: the checkpoint stands at "
                f"{self._saved}, this run at {here}. Undo the change, or start a new run with init_from="
            )
        self._saved = None
        share = self.share
        # overfit_batches asks for the same few batches in every epoch.
        epoch = 0 if self.trainer and self.trainer.overfit_batches else here["epoch"]  # type: ignore[attr-defined]
        draw = self.source.epoch(self.seed, epoch)
        for batch in range(here["step"] * share.accumulation, len(self)):
            begin = (batch * share.world + share.rank) * share.micro_batch
            yield share.pinned(draw(slice(begin, begin + share.micro_batch)))

    def state_dict(self) -> dict[str, int]:
        """The position, epoch and optimizer step within it, and the two numbers that give it its meaning."""
        steps, done = self.steps, 0
        if self.trainer:  # limit_train_batches makes the trainer's epochs shorter
            steps = ceil(min(len(self), self.trainer.num_training_batches) / self.share.accumulation)
            done = self.trainer.global_step
        return {"epoch": done // steps, "step": done % steps, "steps_per_epoch": steps, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Keeps where the checkpoint stands until the first batch is drawn: before, the trainer has no position."""
        self._saved = state


class FixedLoader:
    """This process's share of the same items at every pass, in micro-batches; the last one may be smaller.

    All processes get equally many, as some strategies wait for each other in every batch; so up to world - 1 items
    are left out where their number is no multiple of the processes.
    """

    def __init__(self, items: np.ndarray, share: Share, draw: Callable[[np.ndarray], Batch]):
        self.items = items[: len(items) // share.world * share.world][share.rank :: share.world]
        self.share, self.draw = share, draw

    def __len__(self) -> int:
        return ceil(len(self.items) / self.share.micro_batch)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, len(self.items), self.share.micro_batch):
            yield self.share.pinned(self.draw(self.items[begin : begin + self.share.micro_batch]))
