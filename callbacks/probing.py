"""What callbacks that look at a network on a fixed probe share: the probe, and the way of the numbers to the log."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import compress
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from trainkit.task.base import Task


def probe(loader: Any, samples: int) -> list[Any]:
    """So many samples, or all, in batches spread evenly over those that the loader has."""
    size = next((_samples(batch) for batch in loader), 0)
    if not size:
        raise ValueError("the probe is made of validation samples, and there are none. Check the data")
    count = len(loader)
    wanted = min(count, -(-samples // size))
    chosen = {(2 * k + 1) * count // (2 * wanted) for k in range(wanted)}
    taken = compress(loader, (number in chosen for number in range(count)))
    most = -(-samples // wanted)
    return [_first(batch, most) if _samples(batch) > most else batch for batch in taken]


def _samples(batch: Any) -> int:
    return len(batch if isinstance(batch, Tensor) else batch[0])


def _first(batch: Any, most: int) -> Any:
    """The first samples of a batch: the first axis of each of its tensors."""
    return batch[:most] if isinstance(batch, Tensor) else type(batch)(part[:most] for part in batch)


def publish(
    trainer: Trainer, task: Task, means: Mapping[str, Tensor], maxima: Mapping[str, Tensor] | None = None
) -> None:
    """Writes 0-d tensors to the log by one transfer from the device: means over the ranks, and the largest of maxima.

    Infinite and undefined numbers are written as they are.
    """
    parts = []
    for values, op in ((means, "mean"), (maxima or {}, "max")):
        if values:
            stacked = torch.stack([value.detach().to(task.device, torch.float32) for value in values.values()])
            parts.append(trainer.strategy.reduce(stacked, reduce_op=op) if trainer.world_size > 1 else stacked)
    if parts:
        task.publish(dict(zip([*means, *(maxima or {})], torch.cat(parts).tolist(), strict=True)))
