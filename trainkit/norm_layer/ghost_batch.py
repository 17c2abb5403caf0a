"""Ghost batch normalization (Hoffer, Hubara & Soudry, NeurIPS 2017, arXiv:1705.08741)."""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.norm_layer.batch import BatchNorm


class GhostBatchNorm(BatchNorm):
    """BatchNorm of each ghost by itself; ghosts: the batch cut along its first axis, in order.

    ghost: samples in one. k = max(1, B // ghost) pieces of ceil(B/k) samples, the last one maybe fewer, as torch.chunk
    cuts. chunks: k itself, in place of `ghost`. A large batch keeps the noise of small ones, for their generalization.
    The running statistics take every ghost in turn with the full momentum, so k ghosts leave the old value a weight of
    (1 - momentum)^k, under count="call", one update per ghost; count="step": one update per optimizer step, by the mean
    over all its ghosts. They average variances, as the authors' code, where the paper averages standard deviations.
    Eval is BatchNorm's and knows no ghosts. A last ghost with one position per channel is normalized by the running
    statistics and changes nothing.
    **In replay the order matters.** A batch put together as [current; replayed] falls into ghosts of new samples and
    ghosts of old ones: what is meant to be a mixture is normalized task by task, in eval by neither's statistics.
    Ghosts belong to their rank: there is no sync. Leaks the future in training. Raises ValueError for sizes below 1.
    """

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        ghost: int = 128,
        chunks: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        count: str = "call",
    ):
        super().__init__(width, axis=axis, eps=eps, momentum=momentum, count=count)
        for name, value in (("ghost", ghost), ("chunks", chunks)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        self.ghost, self.chunks = ghost, chunks

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x: samples first, channels on `axis`; pad_mask: x's shape without them, True at padding -> y, like x."""
        if not self.training:
            return super().forward(x, pad_mask)
        k = self.chunks or max(1, len(x) // self.ghost)
        masks = [None] * k if pad_mask is None else pad_mask.chunk(k)
        ghosts = []
        for piece, mask in zip(x.chunk(k), masks, strict=False):  # torch.chunk may make fewer
            y, statistics, n = self.normalize(piece, mask)
            self.observe(statistics, n)
            ghosts.append(y)
        return torch.cat(ghosts)

    def extra_repr(self) -> str:
        size = f"ghost={self.ghost}" if self.chunks is None else f"chunks={self.chunks}"
        return f"{super().extra_repr()}, {size}"
