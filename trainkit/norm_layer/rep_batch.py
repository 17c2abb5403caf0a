"""RepBN (SLAB, Guo et al., ICML 2024, arXiv:2405.11582): batch normalization with a learned share of its input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.batch import BatchNorm


class RepBN(nn.Module):
    """y = BN(x) + alpha x, alpha a scalar; BN's statistics per channel over batch and tokens.

    In eval a fixed affine map per channel, which folds into the next linear layer: inference without a norm.
    init="vision": BN's weight 1, alpha 1. init="llama": weight 0, alpha 0, so that the layer starts as zero. A padded
    position has x in place of BN(x), as in the authors' language model, and does not count in the statistics.
    BN and its running statistics are norm_layer=batch's, but by default count one update per optimizer step; the
    released code makes one per call (count=call). Leaks the future in training.
    """

    leaks = True

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        init: str = "vision",
        count: str = "step",
        sync: str = "none",
    ):
        super().__init__()
        if init not in ("vision", "llama"):
            raise ValueError(f"norm_layer.init is vision or llama; got {init!r}")
        self.axis = axis
        self.bn = BatchNorm(width, axis=axis, eps=eps, momentum=momentum, count=count, sync=sync)
        self.alpha = nn.Parameter(torch.ones(1))
        if init == "llama":
            nn.init.zeros_(self.bn.weight)
            nn.init.zeros_(self.alpha)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x: `width` channels on `axis`; pad_mask: x's shape without them, True at padding -> y, of x's shape."""
        return self.join(x, self.bn(x, pad_mask), pad_mask)

    def join(self, x: Tensor, normalized: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """normalized + alpha x, and x + alpha x at padding."""
        if pad_mask is not None:
            normalized = torch.where(pad_mask.unsqueeze(-1).movedim(-1, self.axis), x, normalized)
        return torch.addcmul(normalized, x, self.alpha.to(x.dtype))

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(a, c) of eval's y = a x + c."""
        a, c = self.bn.scale_shift()
        return a + self.alpha, c
