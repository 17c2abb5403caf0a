"""EvoNorm (Liu, Brock, Simonyan & Le, NeurIPS 2020, arXiv:2004.02967): what the members of the family share.

They are norm and activation in one, found by a search over formulas; none of them centres its input.

`activates` says whether a layer is its own activation, so that a model that asks puts none behind it. Where a network
has no activation after a norm (the end of a residual branch, a shortcut), the model calls `deactivate()`, which is
activation=False for a layer that a factory made like all others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.stateful import wide


def by_channel(x: Tensor, axis: int, width: int) -> Tensor:
    """x with `width` channels on `axis`, samples first -> (B, C, positions), in at least float32."""
    if x.dim() < 2 or not -x.dim() <= axis < x.dim() or x.shape[axis] != width:
        raise ValueError(
            f"the norm layer was built for samples of {width} channels on axis {axis}; got an input of shape "
            f"{tuple(x.shape)}. Check the width and the axis it is built with"
        )
    h = x.movedim(axis, 1)
    return (h.flatten(2) if h.dim() > 2 else h.unsqueeze(2)).to(wide(x.dtype))


def as_given(y: Tensor, x: Tensor, axis: int) -> Tensor:
    """(B, C, positions) -> the shape and dtype of x."""
    return y.reshape(x.movedim(axis, 1).shape).movedim(1, axis).to(x.dtype)


def shaped(parameter: Tensor, h: Tensor) -> Tensor:
    """(C,) -> (C, 1), in the dtype of h: (B, C, positions)."""
    return parameter.to(h.dtype).unsqueeze(1)


class Activating(nn.Module):
    """A norm layer that is its own activation while it has v, a parameter of that activation."""

    v: nn.Parameter | None

    @property
    def activates(self) -> bool:
        return self.v is not None

    def deactivate(self) -> None:
        """From now on no activation; to be called before optimizers see the parameters, since v goes."""
        self.v = None


class EvoNormS(Activating):
    """y = gain · act(x) / sqrt(var + eps) + bias, act(x) = x sigmoid(v x): by the statistics of one sample.

    var (biased): of a group of channels over all positions of a sample; gain, bias, v: (width,). `idle` says whether
    the layer, where it does not activate, does not divide either; then it has no v.
    The first axis is the samples, whatever stands between it and the channels are positions, of tokens too: in a causal
    model that leaks the future, in eval as in training. No state: train and eval are the same.
    """

    leaks = True
    leaks_in_eval = True
    idle = False  # without activation the identity in place of act(x) / sqrt(var + eps)

    def __init__(self, width: int, *, axis: int, groups: int, eps: float, activation: bool):
        super().__init__()
        if width < 1:
            raise ValueError(f"norm_layer needs at least 1 channel; got width {width}. Check the model's width")
        if groups < 1 or width % groups:
            raise ValueError(f"norm_layer.groups must divide the width {width}; got {groups}. Try norm_layer.groups=1")
        self.width, self.axis, self.groups, self.eps = width, axis, groups, eps
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.v = nn.Parameter(torch.ones(width)) if activation else None

    def forward(self, x: Tensor) -> Tensor:
        """x: `width` channels on `axis` -> same shape and dtype."""
        h = by_channel(x, self.axis, self.width)
        y = h if self.v is None else h * torch.sigmoid(shaped(self.v, h) * h)
        if self.v is not None or not self.idle:
            grouped = h.unflatten(1, (self.groups, self.width // self.groups))
            inverse = (grouped.var((2, 3), correction=0, keepdim=True) + self.eps).rsqrt()
            y = (y.view_as(grouped) * inverse).view_as(h)
        return as_given(torch.addcmul(shaped(self.bias, h), y, shaped(self.gain, h)), x, self.axis)

    def extra_repr(self) -> str:
        return f"{self.width}, axis={self.axis}, groups={self.groups}, eps={self.eps:g}, activation={self.activates}"
