"""Group normalization (Wu & He, ECCV 2018, arXiv:1803.08494), per token or per image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import RowNorm, full_precision, over_rows


class GroupNorm(RowNorm):
    """y = gain · (x - mean)/sqrt(var + eps) + bias; mean, var (biased) over a group of channels; gain, bias: (width,).

    On axis 1, images (B, C, …): over a group's channels and all positions of one image, as torch.nn.GroupNorm does.
    On another axis, tokens (…, C): over a group's channels at one position alone. Means over positions as well, which
    torch's layer would take for (B, C, T), would show a causal model its future; so would axis=1 with text.
    groups=1 on tokens is LayerNorm; groups must divide the width, or ValueError. No difference between train and eval.
    """

    leaks = False

    def __init__(self, width: int, *, axis: int = -1, groups: int = 32, eps: float = 1e-5):
        super().__init__(width, axis=axis, eps=eps)
        if groups < 1 or width % groups:
            raise ValueError(f"norm_layer.groups must divide the width {width}; got {groups}. Try norm_layer.groups=1")
        self.groups = groups
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.axis == 1:
            return grouped(x, self.groups, self.gain, self.bias, self.eps)
        return self.by_rows(x, self.gain, self.bias)

    def formula(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        return torch.addcmul(bias, self._normalized(x)[0].flatten(-2), gain)

    def gradient(self, x: Tensor, gy: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        z, inverse = self._normalized(x)
        g = self._split(gy * gain)
        gx = (g - g.mean(-1, keepdim=True) - z * (g * z).mean(-1, keepdim=True)) * inverse
        return gx.flatten(-2), over_rows(gy * z.flatten(-2)), over_rows(gy)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x - mean)/sqrt(var + eps), (rows, groups, channels of one), and 1/sqrt(var + eps)."""
        x = self._split(x)
        x = x - x.mean(-1, keepdim=True)
        inverse = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * inverse, inverse

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.groups, -1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


def grouped(x: Tensor, groups: int, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's kernel, for x: (samples, width, …) and parameters of any dtype."""
    # On a processor it keeps the statistics in the dtype of the gain; other devices want x's own.
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    gain, bias = (None if p is None else p.to(dtype) for p in (gain, bias))
    with full_precision(x):
        return torch.group_norm(x, groups, gain, bias, eps)
