"""What norm layers share that treat every row, the channels of one position, on its own.

A layer says its formula and its gradient on a matrix of rows; here is how they are run: in blocks that stay in the
processor's caches, keeping only the input for the backward, which computes the rest again. Compilers get both in one
piece, to fuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn

BLOCK = 2**19  # numbers that one thread works on at a time: in float32 2 MiB, which the caches hold
GROUP = 32  # rows that compiled code adds up first


class RowNorm(nn.Module):
    """x, with `width` channels on `axis` -> same shape and dtype; y at a position depends on x there alone.

    A layer provides `formula` and `gradient`, and calls `by_rows`. Both see x as (rows, width) in float32, or float64
    where x is (half precision overflows at 256²), and the parameters in the same dtype. NaN goes through. Second
    derivatives are those of `formula`, in eager mode. Raises ValueError on a width below 1, a negative eps and an
    input with another number of channels.
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 0.0):
        super().__init__()
        if width < 1:
            raise ValueError(f"norm_layer needs at least 1 channel; got width {width}. Check the model's width")
        if eps < 0:
            raise ValueError(f"norm_layer.eps keeps a root positive, so it is at least 0; got {eps}. Try 1e-6")
        self.width, self.axis, self.eps = width, axis, eps

    def formula(self, x: Tensor, *parameters: Tensor) -> Tensor:
        """y, by operations that autograd can differentiate."""
        raise NotImplementedError

    def gradient(self, x: Tensor, gy: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The gradients with respect to x and each parameter, from gy, the one with respect to y; keeps x and gy."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """x with its channels on the last axis."""
        if not -x.dim() <= self.axis < x.dim() or x.shape[self.axis] != self.width:
            raise ValueError(
                f"{type(self).__name__} was built for {self.width} channels on axis {self.axis}; "
                f"got an input of shape {tuple(x.shape)}. Check the width and the axis it is built with"
            )
        return x if self.axis == -1 else x.movedim(self.axis, -1)

    def back(self, y: Tensor) -> Tensor:
        """y with its channels on the last axis, in x's order of axes."""
        return y if self.axis == -1 else y.movedim(-1, self.axis)

    def by_rows(self, x: Tensor, *parameters: Tensor | None) -> Tensor:
        """y, by `formula`; for a layer's forward, with its parameters (None: left out)."""
        # vmap, jvp and the other transforms of torch.func differentiate by their own rules.
        run = whole if torch._C._are_functorch_transforms_active() else Recomputed.apply
        return self.back(run(self, self.rows(x), *(p for p in parameters if p is not None)))

    def extra_repr(self) -> str:
        axis = {} if self.axis == -1 else {"axis": self.axis}
        eps = {"eps": self.eps} if self.eps else {}
        return ", ".join([str(self.width), *(f"{k}={v:g}" for k, v in (axis | eps).items())])


class Recomputed(torch.autograd.Function):
    """formula and gradient of a RowNorm, with nothing stored between them but their inputs."""

    @staticmethod
    def forward(ctx, norm: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        ctx.norm = norm
        ctx.save_for_backward(x, *parameters)
        dtype = at_least_float32(x)
        cast = [p.to(dtype) for p in parameters]
        with full_precision(x):
            return assemble((norm.formula(block.to(dtype), *cast) for block in blocks(x)), x)

    @staticmethod
    def backward(ctx, gy: Tensor):  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # create_graph=True: the gradient will be differentiated in turn, which that of the layer need not allow.
            needed = ctx.needs_input_grad[1:]
            wanted = [t for t, need in zip((x, *parameters), needed, strict=True) if need]
            found = iter(torch.autograd.grad(whole(ctx.norm, x, *parameters), wanted, gy, create_graph=True))
            return None, *(next(found) if need else None for need in needed)

        dtype = at_least_float32(x)
        cast = [p.to(dtype) for p in parameters]
        totals = [torch.zeros_like(p) for p in cast]

        def gradients() -> Iterator[Tensor]:
            for block, gy_block in zip(blocks(x), blocks(gy), strict=True):
                gx, *parts = ctx.norm.gradient(block.to(dtype), gy_block.to(dtype), *cast)
                for total, part in zip(totals, parts, strict=True):
                    total += part
                yield gx

        with full_precision(x):
            gx = assemble(gradients(), x)
        return None, gx, *(total.to(p.dtype) for total, p in zip(totals, parameters, strict=True))


def whole(norm: RowNorm, x: Tensor, *parameters: Tensor) -> Tensor:
    """The formula for autograd to see, on all rows, in the precision and dtype of the blocks."""
    dtype = at_least_float32(x)
    with full_precision(x):
        return norm.formula(x.to(dtype), *(p.to(dtype) for p in parameters)).to(x.dtype)


def blocks(x: Tensor) -> tuple[Tensor, ...]:
    """(…, width) as matrices of `block_rows` rows; the last may be shorter."""
    rows, size = x.reshape(-1, x.shape[-1]), block_rows(x)
    return (rows,) if len(rows) <= size else rows.split(size)


def block_rows(x: Tensor) -> int:
    """All rows, or on a processor as many as keep the steps of a formula in its caches.

    Several threads wait for the slowest of them at every step, so they get fewer and larger blocks.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, x.numel() // x.shape[-1])
    size = BLOCK if torch.get_num_threads() == 1 else 16 * BLOCK
    return max(1, size // x.shape[-1])


def assemble(parts: Iterator[Tensor], x: Tensor) -> Tensor:
    """Results for the blocks of x, made one after the other, as one tensor of x's shape and dtype."""
    if x.numel() <= block_rows(x) * x.shape[-1]:
        return next(parts).to(x.dtype).view(x.shape)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for out, part in zip(blocks(y), parts, strict=True):
        out.copy_(part)
    return y


def at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def full_precision(x: Tensor):
    """Keeps autocast from lowering the matrix products of a formula."""
    kind = x.device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if active else nullcontext()


def mean_square(x: Tensor) -> Tensor:
    """mean(x²) over the last axis, kept."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return x.square().mean(-1, keepdim=True)
    # One pass over x in place of two; but where a row is zero its derivatives are not those of the mean square.
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]


def rms_gradient(x: Tensor, gy: Tensor, r: Tensor, gain: Tensor | None = None) -> tuple[Tensor, ...]:
    """The gradients of y = gain · x r, r = 1 / sqrt(mean(x²) + eps), with respect to x and, if given, gain.

    gx = r (g - xh mean(g xh)), g = gain · gy, xh = r x. That is LayerNorm's gradient at mean 0, but for its term
    -r mean(g): so torch's kernel does in one pass what would take six. A compiler fuses the equation itself.
    """
    if torch.compiler.is_compiling():
        xh, g = x * r, gy if gain is None else gy * gain
        gx = (g - xh * (g * xh).mean(-1, keepdim=True)) * r
        return (gx,) if gain is None else (gx, over_rows(gy * xh))
    needed, zero = [True, gain is not None, False], torch.zeros_like(r)
    gx, ggain, _ = torch.ops.aten.native_layer_norm_backward(gy, x, x.shape[-1:], zero, r, gain, None, needed)
    if gain is None:
        return (gx.add_(r * gy.mean(-1, keepdim=True)),)
    return gx.add_(r * (gy @ gain).unsqueeze(-1) / x.shape[-1]), ggain


def over_rows(x: Tensor) -> Tensor:
    """The sum over rows, for the gradient of a parameter."""
    if x.device.type != "cpu" or not torch.compiler.is_compiling() or len(x) % GROUP:
        return x.sum(0)
    # In one stage the compiler would run down the rows channel by channel, out of the cache at every step.
    return x.view(len(x) // GROUP, GROUP, *x.shape[1:]).sum(1).sum(0)
