"""Group normalization (Wu & He, ECCV 2018, arXiv:1803.08494), per token or per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import full_precision


class GroupNorm(nn.Module):
    """y = gain · (x - mean)/sqrt(var + eps) + bias; mean, var (biased) over a group of channels; gain, bias: (width,).

    On axis 1, images (B, C, …): over a group's channels and all positions of one image, as torch.nn.GroupNorm does.
    On the last axis, tokens (…, C): over a group's channels at one position alone. Means over positions too, which is
    what torch's layer would take for (B, C, T), would show a causal model its future; so would axis=1 with text.
    groups=1 on tokens is LayerNorm; groups must divide the width, or ValueError. No difference between train and eval.
    """

    leaks = False

    def __init__(self, width: int, *, axis: int = -1, groups: int = 32, eps: float = 1e-5):
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"norm_layer.groups must divide the width {width}; got {groups}. Try norm_layer.groups=1")
        self.axis, self.groups, self.eps = axis, groups, eps
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        samples = x if self.axis == 1 else x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        y = grouped(samples, self.groups, self.gain, self.bias, self.eps)
        return y if samples is x else y.view(x.movedim(self.axis, -1).shape).movedim(-1, self.axis)

    def extra_repr(self) -> str:
        return f"{len(self.gain)}, groups={self.groups}, axis={self.axis}"


def grouped(x: Tensor, groups: int, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's kernel, (samples, width, …), for any dtype of the parameters."""
    # On a processor it keeps the statistics in the dtype of the gain; other devices want x's own.
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    gain, bias = (None if p is None else p.to(dtype) for p in (gain, bias))
    with full_precision(x):
        return torch.group_norm(x, groups, gain, bias, eps)
