"""Which stretches of a long token array make a batch: stateless, from a seed and two integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor


def windows_per_epoch(tokens: int, context: int) -> int:
    """How many windows of context + 1 tokens at stride `context` fit, whatever the phase; 0: not even one."""
    return max(tokens // context - 1, int(tokens > context))


def shuffled(tokens: int, context: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where the windows of an epoch start, in the order of training: int64 (windows_per_epoch,).

    start_i = phase + context · order_i; phase in [0, context) and the permutation `order` follow from (seed, epoch)
    alone. The phase lets every token be predicted from every amount of context over the epochs. Both are made of the
    generator's raw bits: numpy promises those for good, but not what its shuffling makes of them.
    """
    count = windows_per_epoch(tokens, context)
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    phase = int(bits.random_raw()) % min(context, tokens - count * context)
    return np.argsort(bits.random_raw(count), kind="stable") * context + phase


def spread(tokens: int, context: int, count: int) -> np.ndarray:
    """Where `count` windows start that do not share a target and lie evenly over the tokens; all, where fewer fit."""
    available = (tokens - 1) // context
    count = min(count, available)
    return np.arange(count) * available // max(count, 1) * context


def gather(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both int64 (len(starts), context); targets are the inputs one token later."""
    windows = sliding_window_view(tokens, context + 1)[starts]
    return torch.from_numpy(windows[:, :-1].astype(np.int64)), torch.from_numpy(windows[:, 1:].astype(np.int64))


class Windows:
    """The training windows of a token array, as TrainLoader draws them."""

    def __init__(self, tokens: np.ndarray, context: int):
        self.tokens, self.context = tokens, context

    def __len__(self) -> int:
        return windows_per_epoch(len(self.tokens), self.context)

    def epoch(self, seed: int, epoch: int) -> Callable[[slice], tuple[Tensor, Tensor]]:
        starts = shuffled(len(self.tokens), self.context, seed=seed, epoch=epoch)
        return lambda part: gather(self.tokens, starts[part], self.context)
