"""Statistics of channels over all tokens: the layout, the sums and the kernel that batch-statistic layers share.

Rows are tokens, columns are channels. Loops go over blocks of rows that fit the processor's cache, which makes them
three times faster; on other devices, and under torch.compile, there is one block.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from trainkit.norm_layer.stateful import wide

BLOCK = 2**19  # numbers in a block, 2 MiB in float32: a few of them stay in the cache


def to_rows(x: Tensor, axis: int, width: int) -> Tensor:
    """x with `width` channels on `axis` -> (tokens, width)."""
    if x.shape[axis] != width:
        raise ValueError(
            f"the norm layer was built for {width} channels on axis {axis}; got an input of shape {tuple(x.shape)}. "
            "Check the width and the axis it is built with"
        )
    return x.movedim(axis, -1).reshape(-1, x.shape[axis])


def from_rows(rows: Tensor, x: Tensor, axis: int) -> Tensor:
    """(tokens, C) -> the shape of x."""
    return rows.view(x.movedim(axis, -1).shape).movedim(-1, axis)


def affine(x: Tensor, a: Tensor, c: Tensor, axis: int) -> Tensor:
    """y = a x + c per channel, in at least float32 -> x's dtype."""
    return torch.addcmul(c, x.movedim(axis, -1).to(wide(x.dtype)), a).movedim(-1, axis).to(x.dtype)


def valid_rows(pad_mask: Tensor | None, x: Tensor, axis: int) -> Tensor | None:
    """A mask of x's shape without the channels, True at padding -> (tokens, 1), True at tokens that count."""
    if pad_mask is None:
        return None
    positions = x.movedim(axis, -1).shape[:-1]
    if pad_mask.shape != positions or pad_mask.dtype != torch.bool:
        raise ValueError(
            f"pad_mask must be boolean and of shape {tuple(positions)}, that of x without its channels; "
            f"got {pad_mask.dtype} {tuple(pad_mask.shape)}. Pass True where a position is padding"
        )
    return ~pad_mask.reshape(-1, 1)


def number(rows: Tensor, valid: Tensor | None) -> Tensor:
    """How many rows count, as a tensor on their device."""
    dtype = wide(rows.dtype)
    if valid is None:
        return torch.full((), len(rows), dtype=dtype, device=rows.device)
    return valid.sum().to(dtype)


def blocks(rows: Tensor, *others: Tensor | None) -> Iterable[tuple]:
    """The same rows of several tensors, block by block; None stays None."""
    if rows.device.type != "cpu" or torch.compiler.is_compiling():
        return [(rows, *others)]
    size = max(1, BLOCK // rows.shape[1])
    return zip(*(repeat(None) if t is None else t.split(size) for t in (rows, *others)), strict=False)


def only(valid: Tensor | None, values: Tensor) -> Tensor:
    """Zeros in rows that do not count. Chosen, not multiplied: padding may hold NaN."""
    return values if valid is None else torch.where(valid, values, 0.0)


def synchronized(sync: str) -> bool:
    """Whether there are ranks to agree with."""
    return sync == "mean" and distributed.is_available() and distributed.is_initialized()


def over_ranks(sync: str, *values: Tensor) -> tuple[Tensor, ...]:
    """The sums of `values` over all ranks for sync=mean, in one message; else the values themselves."""
    if not synchronized(sync):
        return values
    message = torch.cat([value.flatten() for value in values])
    distributed.all_reduce(message)
    parts = message.split([value.numel() for value in values])
    return tuple(part.view_as(value) for part, value in zip(parts, values, strict=True))


def mean_square(rows: Tensor, valid: Tensor | None, sync: str) -> tuple[Tensor, Tensor]:
    """The mean of x² per channel over the rows that count, and their number; without gradient. No rows: mean 0."""
    total = torch.zeros(rows.shape[1], dtype=wide(rows.dtype), device=rows.device)
    for x, v in blocks(rows, valid):
        total += only(v, x.to(total.dtype).square()).sum(0)
    total, n = over_ranks(sync, total, number(rows, valid))
    return total / n.clamp(min=1), n


class Standardize(torch.autograd.Function):
    """y = (x - mean)/sqrt(var + eps) · gain + bias, statistics per channel over rows that count, exact gradients.

    x: (N, C). var is the mean of (x - mean)². Fewer than two rows that count have no statistics: `mean` and `var` as
    given serve, as constants. mean=None: nothing is centred, var is the mean of x², and one row is enough.
    Rows that do not count are transformed like the others. -> y, and without gradients mean, var, number of rows.
    With sync, sums run over all ranks, in the backward too; the gradients of gain and bias stay those of the rank.
    """

    @staticmethod
    def forward(ctx, x, gain, bias, mean, var, valid, eps: float, sync: str):
        dtype = wide(x.dtype)
        gain, bias, var = gain.to(dtype), bias.to(dtype), var.to(dtype)
        n, ctx.center = number(x, valid), mean is not None
        if mean is not None:
            total = torch.zeros_like(var)
            for block, v in blocks(x, valid):
                total += only(v, block.to(dtype)).sum(0)
            total, n = over_ranks(sync, total, n)
            enough = n >= 2
            mean = torch.where(enough, total / n, mean.to(dtype))
        else:
            (n,) = over_ranks(sync, n)
            enough = n >= 1
            mean = torch.zeros_like(var)
        total = torch.zeros_like(var)
        for block, v in blocks(x, valid):
            total += only(v, (block.to(dtype) - mean).square()).sum(0)
        (total,) = over_ranks(sync, total)
        var = torch.where(enough, total / n, var)

        inverse, y = torch.rsqrt(var + eps), torch.empty_like(x)
        scale = gain * inverse
        for block, out in blocks(x, y):
            out.copy_(torch.addcmul(bias, block.to(dtype) - mean, scale))
        ctx.save_for_backward(x, gain, mean, inverse, torch.where(enough, 1 / n, 0.0), valid)
        ctx.sync = sync
        ctx.mark_non_differentiable(mean, var, n)
        return y, mean, var, n

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, *_):
        x, gain, mean, inverse, share, valid = ctx.saved_tensors
        along, total = torch.zeros_like(mean), torch.zeros_like(mean)
        for block, g in blocks(x, gy):
            g = g.to(mean.dtype)
            along += (g * (block.to(mean.dtype) - mean)).sum(0)
            total += g.sum(0)
        g_gain, g_bias = along * inverse, total
        along, total = over_ranks(ctx.sync, along, total)

        scale = gain * inverse
        tilt, shift = scale * inverse.square() * along * share, scale * total * share
        gx = torch.empty_like(x)
        for block, g, v, out in blocks(x, gy, valid, gx):
            through = (block.to(mean.dtype) - mean) * tilt
            if ctx.center:
                through = through + shift
            out.copy_(g.to(mean.dtype) * scale - only(v, through))
        return gx, g_gain, g_bias, *(None,) * 5
