"""Batch-channel normalization (Qiao et al. 2019, arXiv:1911.09738): over the batch, then over channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.batch import batch
from trainkit.norm_layer.estimated_batch import EstimatedBatchNorm
from trainkit.norm_layer.group import grouped


class BatchChannelNorm(nn.Module):
    """y = gain_g · (z - mean_g)/sqrt(var_g + eps_channel) + bias_g,  z = BN(x).

    BN: with weight and bias per channel, by the batch's statistics (norm_layer=batch), or, with statistics="estimated",
    by running ones in training too, which is for micro-batches down to one image; then `speed` is how far an update
    moves them (the authors tie it to the learning rate from outside: estimated_batch.set_speed), and `momentum` is
    idle. mean_g, var_g (biased): of a group of channels of z over all positions of one sample. gain, bias: (groups,),
    one pair per group as in the released code, since BN has its own per channel; groups must divide the width.
    The channel part bounds what leaves the layer whatever the batch statistics do; the batch part keeps channels from
    dying, as they may under channel norms alone. Made for convolutions with standardized weights. Two norms' cost.
    The first axis is the samples; tokens leak the future, in eval too. count and sync: see Stateful.
    """

    leaks = True
    leaks_in_eval = True

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        groups: int = 32,
        eps: float = 1e-5,
        eps_channel: float = 1e-5,
        momentum: float = 0.1,
        statistics: str = "batch",
        speed: float = 0.1,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__()
        if statistics not in ("batch", "estimated"):
            raise ValueError(f"norm_layer.statistics is batch or estimated; got {statistics!r}")
        common = {"axis": axis, "eps": eps, "count": count, "sync": sync}
        if statistics == "batch":
            self.bn = batch(width, momentum=momentum, **common)
        else:
            self.bn = EstimatedBatchNorm(width, speed=speed, **common)
        if groups < 1 or width % groups:
            raise ValueError(f"norm_layer.groups must divide the width {width}; got {groups}. Try norm_layer.groups=1")
        self.width, self.axis, self.groups, self.eps_channel = width, axis, groups, eps_channel
        self.gain, self.bias = nn.Parameter(torch.ones(groups)), nn.Parameter(torch.zeros(groups))

    def forward(self, x: Tensor) -> Tensor:
        """x: `width` channels on `axis` -> same shape and dtype."""
        z = self.bn(x).movedim(self.axis, 1)
        gain, bias = (p.repeat_interleave(self.width // self.groups) for p in (self.gain, self.bias))
        return grouped(z, self.groups, gain, bias, self.eps_channel).movedim(1, self.axis)

    def extra_repr(self) -> str:
        return f"groups={self.groups}, eps_channel={self.eps_channel:g}"
