"""The layer of IBN-Net-a (Pan, Luo, Shi & Tang, ECCV 2018): some channels by instance, the others by batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.batch import batch
from trainkit.norm_layer.instance import InstanceNorm


class IBN(nn.Module):
    """y = [IN(first floor(ratio · width) channels), BN(the others)]; both with gain and bias per channel.

    IN, per sample over its positions, takes away appearance (contrast, brightness, style) and keeps nothing in mind; BN
    keeps what tells classes apart. In the paper's networks it stands in for the first norm of the residual branches of
    the first three of four stages (surgery/ibn.py puts it there), since deep features should keep their content.
    Needs 0 < ratio · width < width, or ValueError. The released code drops channels where ratio < 0.5; here BN has all
    that IN has not. The first axis is the samples; tokens leak the future, in eval too. count and sync: see Stateful.
    """

    leaks = True
    leaks_in_eval = True

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        ratio: float = 0.5,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__()
        if width < 1:
            raise ValueError(f"norm_layer needs at least 1 channel; got width {width}. Check the model's width")
        first = int(ratio * width)
        if not 0 < first < width:
            raise ValueError(
                f"norm_layer=ibn needs channels for both of its halves; norm_layer.ratio={ratio} of {width} channels "
                f"leaves {max(first, 0)} for one. Try norm_layer.ratio=0.5 and a width of 2 at least"
            )
        self.axis, self.widths = axis, [first, width - first]
        self.instance = InstanceNorm(first, axis=axis, eps=eps)
        self.batch = batch(width - first, axis=axis, eps=eps, momentum=momentum, count=count, sync=sync)

    def forward(self, x: Tensor) -> Tensor:
        """x: `width` channels on `axis` -> same shape and dtype."""
        if x.shape[self.axis] != sum(self.widths):
            raise ValueError(
                f"the norm layer was built for {sum(self.widths)} channels on axis {self.axis}; got an input of shape "
                f"{tuple(x.shape)}. Check the width and the axis it is built with"
            )
        first, rest = x.split(self.widths, self.axis)
        return torch.cat([self.instance(first), self.batch(rest)], self.axis)
