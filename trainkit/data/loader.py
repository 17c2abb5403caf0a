"""Iterables of batches: training from the trainer's position on, evaluation over fixed items."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

Batch = tuple[Tensor, Tensor]  # inputs and what is to be predicted
Some = TypeVar("Some", bound=tuple[Tensor, ...])
AHEAD = 2  # batches per worker that wait to be used


@dataclass(frozen=True)
class Share:
    """One process's part of an optimizer step; micro_batch: items per forward pass; pin: the GPU that batches wait for
    in page-locked memory, from which they are copied to it while it computes; None: they stay where they are.

    workers: threads that draw the next batches meanwhile; 0: each batch is drawn when it is asked for. Threads, as what
    takes the time, copying out of large arrays, leaves Python's lock to others; nothing has to be sent to them.
    """

    micro_batch: int
    world: int = 1
    rank: int = 0
    accumulation: int = 1
    pin: torch.device | None = None
    workers: int = 0

    @classmethod
    def of(cls, trainer: Trainer | None, batch_size: int, workers: int = 0) -> Share:
        """Raises ValueError where `batch_size` cannot be shared out evenly, or `workers` is negative."""
        if workers < 0:
            raise ValueError(f"data.workers must not be negative; got {workers}")
        if trainer is None:
            return cls(batch_size, workers=workers)
        world, accumulation = trainer.world_size, trainer.accumulate_grad_batches
        micro_batch, left = divmod(batch_size, world * accumulation)
        if left:
            raise ValueError(
                f"data.batch_size={batch_size} must be a multiple of {world} processes x "
                f"trainer.accumulate_grad_batches={accumulation}; try {(micro_batch + 1) * world * accumulation}"
            )
        device = trainer.strategy.root_device
        pin = device if device.type == "cuda" else None
        return cls(micro_batch, world, trainer.global_rank, accumulation, pin, workers)

    @property
    def batch_size(self) -> int:
        """Items per optimizer step, over all processes and accumulated batches."""
        return self.micro_batch * self.world * self.accumulation

    def grown(self, batch_size: int, most: int, micro_batch: int) -> Share:
        """The share of a step of at least `batch_size` items, and of at most `most`; never of fewer than now.

        Each forward pass takes as many more items as that needs, up to `micro_batch`, beyond which more of them are
        accumulated; rounded up to what the processes can share evenly, or down where that would exceed `most`.
        """
        batch_size = min(batch_size, most)
        micro, accumulation = ceil(batch_size / (self.world * self.accumulation)), self.accumulation
        if micro > micro_batch:
            micro, accumulation = micro_batch, ceil(batch_size / (self.world * micro_batch))
        share = replace(self, micro_batch=micro, accumulation=accumulation)
        if share.batch_size > most:
            if accumulation > self.accumulation:
                share = replace(share, accumulation=accumulation - 1)
            else:
                share = replace(share, micro_batch=micro - 1)
        return share if share.batch_size > self.batch_size else self

    def pinned(self, batch: Some) -> Some:
        if self.pin is None:
            return batch
        moved = [part.pin_memory() for part in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)  # a NamedTuple, or a tuple

    def drawn(self, draws: Iterable[Callable[[], Some]]) -> Iterator[Some]:
        """What these functions give, in their order, ready to be used; the order and the numbers do not depend on
        `workers`."""
        if not self.workers:
            yield from (self.pinned(draw()) for draw in draws)
            return
        waiting: deque[Future[Some]] = deque()
        # A new thread uses the first GPU, where page-locking would take memory for every process.
        begin = partial(torch.cuda.set_device, self.pin) if self.pin is not None else None
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="data", initializer=begin)
        try:
            for draw in draws:
                waiting.append(pool.submit(lambda draw=draw: self.pinned(draw())))
                if len(waiting) > AHEAD * self.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also where the run ends before the epoch does
            pool.shutdown(wait=True, cancel_futures=True)


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

        def parts() -> Iterator[Callable[[], Batch]]:
            for batch in range(here["step"] * share.accumulation, len(self)):
                begin = (batch * share.world + share.rank) * share.micro_batch
                yield partial(draw, slice(begin, begin + share.micro_batch))

        yield from share.drawn(parts())

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


class GrowingLoader:
    """Batches without end, from the trainer's position on, of a size that may change between two optimizer steps.

    An optimizer step takes the next `share.batch_size` items of its epoch's shuffled order, shared out as TrainLoader
    does; where fewer are left, they are left out and the next epoch begins. The position is `samples` items into
    `epoch`, at the optimizer step `since`, plus a batch for every step that the trainer has made after that one; it is
    part of a checkpoint, and so is the batch size.

    Batches are drawn when they are asked for, as nobody knows how large the next one will be. A pass ends when the
    batch size changes, because the trainer can change its accumulation only then; for the trainer that is an epoch. Its
    length is never reached.
    """

    def __init__(self, source: Source, share: Share, *, seed: int, trainer: Trainer):
        if len(source) < share.batch_size:
            raise ValueError(f"data.batch_size={share.batch_size} is more than the {len(source)} items there are")
        self.source, self.share, self.seed, self.trainer = source, share, seed, trainer
        self.epoch = self.samples = self.seen = self.since = 0
        self._passing = share  # that of the pass in progress

    def __len__(self) -> int:
        return 2**40

    def position(self) -> tuple[int, int]:
        """(epoch, items into it) that the next optimizer step begins at."""
        steps, batch = self.trainer.global_step - self.since, self.share.batch_size
        rest = (len(self.source) - self.samples) // batch  # steps that this epoch has room for
        if steps < rest:
            return self.epoch, self.samples + steps * batch
        epochs, steps = divmod(steps - rest, len(self.source) // batch)
        return self.epoch + 1 + epochs, steps * batch

    def samples_seen(self) -> int:
        """Items that the optimizer steps so far were made of, over all epochs and processes."""
        return self.seen + (self.trainer.global_step - self.since) * self.share.batch_size

    def begin(self, share: Share) -> None:
        """Shares out steps in another way, before the first pass of all."""
        self.share = self._passing = share

    def grow(self, share: Share) -> None:
        """Takes steps of another size from the next one on; called between two optimizer steps."""
        self.seen, (self.epoch, self.samples) = self.samples_seen(), self.position()
        self.since, self.share = self.trainer.global_step, share

    def __iter__(self) -> Iterator[Batch]:
        share = self._passing
        known, draw = -1, None
        while share is self.share:
            epoch, begin = self.position()
            if draw is None or epoch != known:
                known, draw = epoch, self.source.epoch(self.seed, epoch)
            for micro in range(share.accumulation):
                first = begin + (micro * share.world + share.rank) * share.micro_batch
                yield share.pinned(draw(slice(first, first + share.micro_batch)))
        self._passing = self.share

    def state_dict(self) -> dict[str, int | bool]:
        """The position, what follows it, and the numbers that give it its meaning."""
        epoch, samples = self.position()
        position = {"epoch": epoch, "samples": samples, "seen": self.samples_seen(), "step": self.trainer.global_step}
        batch = {"batch_size": self.share.batch_size, "accumulation": self.share.accumulation}
        # Whether the batch has changed and the pass of the old one has not ended yet.
        return {
            **position,
            **batch,
            "ending": self._passing is not self.share,
            "items": len(self.source),
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, int | bool]) -> None:
        """Raises ValueError where the checkpoint is of other data, or its batch cannot be shared out here."""
        here = {"items": len(self.source), "seed": self.seed}
        if any(state.get(name) != value for name, value in here.items()):
            raise ValueError(
                "a resumed run must keep its data, seed, data.context and whether its batch grows: the checkpoint has "
                f"{state}, this run {here}. Undo the change, or start a new run with init_from="
            )
        accumulation = int(state["accumulation"])
        micro_batch, left = divmod(int(state["batch_size"]), self.share.world * accumulation)
        if left:
            raise ValueError(
                f"the run to be resumed has grown its batch to {state['batch_size']}, in {accumulation} accumulated "
                f"batches, which {self.share.world} processes cannot share evenly; use as many as before"
            )
        self.epoch, self.samples, self.seen = (int(state[name]) for name in ("epoch", "samples", "seen"))
        self.since = int(state["step"])
        share = replace(self.share, micro_batch=micro_batch, accumulation=accumulation)
        self._passing, self.share = (self.share, share) if state["ending"] else (share, share)


def train_loader(
    source: Source, share: Share, *, seed: int, trainer: Trainer | None, growing: bool
) -> TrainLoader | GrowingLoader:
    """The loader of a training set, of the kind whose batches can grow if `growing`."""
    if growing:
        assert trainer is not None
        return GrowingLoader(source, share, seed=seed, trainer=trainer)
    return TrainLoader(source, share, seed=seed, trainer=trainer)


class FixedLoader:
    """This process's share of the same items at every pass, in micro-batches; the last one may be smaller.

    All processes get equally many, as some strategies wait for each other in every batch; so up to world - 1 items
    are left out where their number is no multiple of the processes.
    """

    def __init__(self, items: np.ndarray, share: Share, draw: Callable[[np.ndarray], Any]):
        self.items = items[: len(items) // share.world * share.world][share.rank :: share.world]
        self.share, self.draw = share, draw

    def __len__(self) -> int:
        return ceil(len(self.items) / self.share.micro_batch)

    def __iter__(self) -> Iterator[Any]:
        size = self.share.micro_batch
        begins = range(0, len(self.items), size)
        yield from self.share.drawn(partial(self.draw, self.items[begin : begin + size]) for begin in begins)
