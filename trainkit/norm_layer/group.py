"""Group normalization (Wu & He, ECCV 2018, arXiv:1803.08494), per token or per image."""

import torch
from torch import Tensor, nn


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
        # torch keeps the statistics in float32, and wants parameters of x's own type on some devices.
        y = torch.group_norm(samples, self.groups, self.gain.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return y if samples is x else y.view(x.movedim(self.axis, -1).shape).movedim(-1, self.axis)

    def extra_repr(self) -> str:
        return f"{len(self.gain)}, groups={self.groups}, axis={self.axis}"
