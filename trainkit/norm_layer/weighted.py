"""Batch statistics of weighted samples, in groups: what layers share that do not treat a batch as one heap of pixels.

Everything about a sample is in its own mean and variance per channel, so weights and groups cost next to nothing: two
passes over the input find those, a third normalizes, and all the rest is on tables of (samples, channels).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainkit.norm_layer.channels import BLOCK, over_ranks
from trainkit.norm_layer.stateful import wide


def to_samples(x: Tensor, axis: int, width: int) -> Tensor:
    """x with `width` channels on `axis`, samples first -> (samples, width, positions)."""
    if x.dim() < 2 or x.shape[axis] != width:
        raise ValueError(
            f"the norm layer was built for {width} channels on axis {axis}; got an input of shape {tuple(x.shape)}. "
            "Check the width and the axis it is built with"
        )
    x = x if axis == 1 else x.movedim(axis, 1)
    return (x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)).contiguous()


def from_samples(y: Tensor, x: Tensor, axis: int) -> Tensor:
    """(samples, width, positions) -> the shape of x."""
    return y.view_as(x) if axis == 1 else y.view(x.movedim(axis, 1).shape).movedim(1, axis)


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (B, C, P) -> mean and biased variance of each sample per channel, (B, C), without gradient."""
    dtype = wide(x.dtype)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        var, mean = torch.var_mean(x.to(dtype), 2, correction=0)
        return mean, var
    # On a processor torch's var_mean takes twenty times as long.
    mean = x.mean(2, dtype=dtype)
    return mean, deviations(x, mean.unsqueeze(2))


def deviations(x: Tensor, center: Tensor) -> Tensor:
    """mean_p (x - center)² of each sample per channel, (B, C), of x: (B, C, P) and center: (B, C, 1)."""
    out = center.new_empty(x.shape[:2])
    for block, c, norm in parts(x, center, out):
        torch.linalg.vector_norm(block.to(c.dtype) - c, dim=2, out=norm)
    return out.square_().div_(x.shape[2])


def add_affine(out: Tensor, x: Tensor, center: Tensor, tilt: Tensor, shift: Tensor) -> None:
    """out += (x - center) tilt + shift, of out, x: (B, C, P) and center, tilt, shift: (B, C, 1)."""
    for o, block, c, a, b in parts(out, x, center, tilt, shift):
        o.add_((block.to(c.dtype) - c).mul_(a).add_(b))


def parts(x: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same samples of several tensors: all, or on a processor as many as its cache holds of x, (B, C, P)."""
    size = max(1, BLOCK // max(1, x.shape[1] * x.shape[2]))
    if len(x) <= size or x.device.type != "cpu" or torch.compiler.is_compiling():
        return [(x, *others)]
    return zip(*(t.split(size) for t in (x, *others)), strict=True)


class Groups:
    """Which group each sample belongs to: its index, (B,), int64; None: all are in the only one."""

    def __init__(self, index: Tensor | None = None, number: int = 1):
        self.index, self.number = index, number
        if index is not None:
            self.members = index == torch.arange(number, device=index.device).unsqueeze(1)  # (G, B)

    def sum(self, values: Tensor) -> Tensor:
        """(B, C) -> (G, C)."""
        if self.index is None:
            return values.sum(0, keepdim=True)
        # Not index_add, which on CUDA adds in an order of its own each time; chosen, for NaN is in its own group alone.
        return torch.where(self.members.unsqueeze(2), values, 0.0).sum(1)

    def each(self, values: Tensor) -> Tensor:
        """(G, C) -> (B, C), that of each sample's group; with one group (1, C)."""
        return values if self.index is None else values.index_select(0, self.index)


class Statistics(NamedTuple):
    """Per group and channel, (G, C), over all ranks, without gradient; share: (G, 1), the sum of the weights."""

    mean: Tensor
    var: Tensor
    share: Tensor


@torch.no_grad()
def statistics(m: Tensor, v: Tensor, s: Tensor, groups: Groups, sync: str) -> Statistics:
    """mean = sum_i s_i m_i, var = sum_i s_i (v_i + (m_i - mean)²) over a group's samples i, of moments m, v: (B, C).

    s: (B,). That is the weighted mean of x, and of (x - mean)², over samples and positions, also where the weights sum
    to less than 1.
    """
    s = s.unsqueeze(1)
    mean, share = over_ranks(sync, groups.sum(s * m), groups.sum(s))
    (var,) = over_ranks(sync, groups.sum(s * (v + (m - groups.each(mean)).square())))
    return Statistics(mean, var, share)


def normalize(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    s: Tensor,
    found: tuple[Tensor, Tensor],
    stats: Statistics,
    constant: Tensor,
    groups: Groups,
    eps: float,
    sync: str,
) -> Tensor:
    """y = gain (x - mean)/sqrt(var + eps) + bias per group, with exact gradients.

    x: (B, C, P); gain, bias: (G, C); found, stats: what `moments` and `statistics` said of x and the weights s, to
    which gradients go as well. constant: (G, 1), True where mean and var are numbers from elsewhere. With sync the
    gradients of x and s are those of the sum of all ranks' losses; the gradients of gain and bias stay the rank's.
    """
    return Normalize.apply(x, gain, bias, s, *found, *stats, constant, groups, eps, sync)  # type: ignore[return-value]


class Normalize(torch.autograd.Function):
    """The kernel of `normalize`."""

    @staticmethod
    def forward(ctx, x, gain, bias, s, m, v, mean, var, share, constant, groups: Groups, eps: float, sync: str):
        ctx.save_for_backward(x, gain, s, m, v, mean, var, share, constant)
        ctx.groups, ctx.eps, ctx.sync = groups, eps, sync
        if x.numel() == 0:
            return torch.empty_like(x)
        if groups.index is None:
            return F.batch_norm(x, mean[0], var[0], gain[0], bias[0], False, 0.0, eps)
        of_each = [flat(groups.each(t), x) for t in (mean, var, gain, bias)]
        return F.batch_norm(planes(x), of_each[0], of_each[1], of_each[2], of_each[3], False, 0.0, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, gain, s, m, v, mean, var, share, constant = ctx.saved_tensors
        groups, s = ctx.groups, s.unsqueeze(1)
        if x.numel():
            weight, center, spread = (flat(groups.each(t), x) for t in (gain, mean, var))
            gx, along, total = torch.ops.aten.native_batch_norm_backward(
                planes(gy.contiguous()), planes(x), weight, center, spread, None, None, False, ctx.eps, [True] * 3
            )
            gx, along, total = gx.view(x.shape), along.view_as(m), total.view_as(m)
        else:
            gx, along, total = torch.zeros_like(x), torch.zeros_like(m), torch.zeros_like(m)
        g_gain, g_bias = groups.sum(along), groups.sum(total)

        # What mean and var do to all outputs; along: sum of gy (x - mean)/sqrt(var + eps), total: of gy.
        along, total = over_ranks(ctx.sync, g_gain, g_bias)
        inverse = torch.rsqrt(var + ctx.eps)
        g_var = torch.where(constant, 0.0, -gain * along * inverse.square() / 2)
        g_mean = -gain * total * inverse - 2 * g_var * mean * (1 - share)
        g_mean, g_var = groups.each(torch.where(constant, 0.0, g_mean)), groups.each(g_var)

        center = groups.each(mean)
        g_s = (g_mean * m + g_var * (v + (m - center).square())).sum(1)
        if x.numel():
            shift, tilt = s * g_mean / x.shape[2], 2 * s * g_var / x.shape[2]
            add_affine(gx, x, *(t.expand_as(m).unsqueeze(2) for t in (center, tilt, shift)))
        return gx, g_gain, g_bias, g_s, *(None,) * 9


def planes(x: Tensor) -> Tensor:
    """(B, C, P) as one sample of B·C channels, for kernels that sum per channel."""
    return x.view(1, -1, x.shape[2])


def flat(values: Tensor, x: Tensor) -> Tensor:
    """Values per sample and channel, (B, C) or (1, C), in the order of `planes`."""
    return values.expand(x.shape[:2]).reshape(-1)
