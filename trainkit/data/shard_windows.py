"""Which stretches of many token files make a batch: from a seed and two integers, whatever the size of the corpus.

A window never reaches beyond the end of its file, so an epoch leaves out less than two windows of each, at its ends;
how much at which end changes from epoch to epoch. The windows of all files are in one order, over all of them, which
follows from (seed, epoch) alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trainkit.data.loader import Batch
from trainkit.data.order import Order
from trainkit.data.shard_files import Shards
from trainkit.data.windows import windows_per_epoch


class ShardWindows:
    """The training windows of token files, as TrainLoader draws them; memory: a few numbers per file.

    In file f of an epoch, window i starts at phase_f + context · i; phase_f lets every token be predicted from every
    amount of context over the epochs, as in trainkit.data.windows.
    """

    def __init__(self, shards: Shards, context: int):
        self.shards, self.context = shards, context
        counts = [windows_per_epoch(tokens, context) for tokens in shards.tokens.tolist()]
        self.ends = np.cumsum(counts)
        self.begins = self.ends - counts
        self.room = np.minimum(context, np.maximum(shards.tokens - np.array(counts) * context, 1))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def epoch(self, seed: int, epoch: int) -> Callable[[slice], Batch]:
        bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
        phases = (bits.random_raw(1) % self.room.astype(np.uint64)).astype(np.int64)
        order = Order(len(self), bits)

        def draw(part: slice) -> Batch:
            items = order(np.arange(part.start, part.stop))
            owners = np.searchsorted(self.ends, items, side="right")
            starts = phases[owners] + (items - self.begins[owners]) * self.context
            return self.shards.gather(owners, starts, self.context)

        return draw


def spread_over(shards: Shards, context: int, count: int) -> tuple[np.ndarray, Callable[[np.ndarray], Batch]]:
    """`count` windows that do not share a target and lie evenly over all files, and what gives some of them; all
    windows, where there are fewer."""
    ends = np.cumsum((shards.tokens - 1) // context)
    begins = ends - (shards.tokens - 1) // context
    count = min(count, int(ends[-1]))

    def draw(items: np.ndarray) -> Batch:
        owners = np.searchsorted(ends, items, side="right")
        return shards.gather(owners, (items - begins[owners]) * context, context)

    return np.arange(count) * int(ends[-1]) // max(count, 1), draw
