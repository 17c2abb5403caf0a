"""Unified Normalization (Yang et al., ACM MM 2022, arXiv:2208.01313): batch quadratic means smoothed over a window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainkit.norm_layer.channels import affine, blocks, from_rows, mean_square, number, over_ranks, to_rows, valid_rows
from trainkit.norm_layer.stateful import Stateful, statistic, wide

COMPENSATED_AFTER = 1000  # steps; fixed in the released code
LARGEST_COMPENSATION = 5.0


class UnifiedNorm(Stateful):
    """y = gain · z + bias, z = x/sqrt(v + eps); v (width,): the geometric mean of x²'s batch means over the last steps.

    window: their number, [forward, backward] or one for both. State: squares (forward, width) and gradients
    (backward, width), the windows, from 0; running_square R, from 1; running_gradient e, from 0; the step i; skips.
    A step with s = mean over tokens of x², W = warmup, M = window:
        i <- i + 1;  squares[i mod M] <- s
        filtration, i >= W:  if in any channel arithmetic - geometric mean of squares > M var(sqrt(squares before)),
            var over all M · width entries: squares[i mod M] <- R, and this step is skipped
        v = s if i <= M, i < W or skipped, else exp(mean of log squares);  R <- momentum R + (1 - momentum) v.
    Backward, r = sqrt((v + eps)/(R before + eps)) in [1/5, 5], but 1 if i <= max(1000, W) or skipped; g = gain · gy r:
        G = mean over all tokens, padding included, of g z;  gradients[i mod M] <- G, or e if skipped
        G' = G if i <= M, i < W or skipped, else the mean of gradients;  e <- momentum e + (1 - momentum) G'
        gx = (g - e z)/sqrt(v + eps) with the new e, or G' in its place if skipped; gain's gradient carries r as well.
    In eval v is R: a fixed scale per channel, which folds into the next linear layer. filtration keeps outliers out of
    the windows; the paper has it on for images, off for language. When fine-tuning, set the buffer `steps` to 0.
    The released code counts calls instead of optimizer steps (count=call). Under count=step each micro-batch is
    normalized with the window that its own s completes, and the step is made with the mean s and G. gradients and e
    follow what the backward finds, in the unit of the loss's gradient. Leaks the future in training. A batch of padding
    alone is divided by R and changes nothing. Raises ValueError for a window below 1.
    """

    reads = ("squares", "gradients", "running_square", "running_gradient", "steps")
    squares: Tensor
    gradients: Tensor
    running_square: Tensor
    running_gradient: Tensor
    steps: Tensor
    skips: Tensor
    skipped: Tensor

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-5,
        window: int | Sequence[int] = 4,
        warmup: int = 4000,
        momentum: float = 0.9,
        filtration: bool = False,
        count: str = "step",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        sizes = [window, window] if isinstance(window, int) else list(window)
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"norm_layer.window is a number of steps or [forward, backward]; got {window}. Try 4")
        self.axis, self.eps, self.warmup, self.momentum, self.filtration = axis, eps, warmup, momentum, filtration
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("squares", statistic(sizes[0], width))
        self.register_buffer("gradients", statistic(sizes[1], width))
        self.register_buffer("running_square", statistic(width, fill=1.0))
        self.register_buffer("running_gradient", statistic(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("skips", torch.zeros((), dtype=torch.long))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.bool), persistent=False)  # the last step
        self.expect_statistics(1, width, gradient_rows=1)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x: `width` channels on `axis`; pad_mask: x's shape without them, True at padding -> y, of x's shape."""
        if not self.training:
            return affine(x, *self.scale_shift(), self.axis)
        rows = to_rows(x, self.axis, len(self.gain))
        with torch.no_grad():
            s, n = mean_square(rows, valid_rows(pad_mask, x, self.axis), self.sync)
            squares, gradients, running, e, i = self.read(s)
            _, v, skip, _ = self._smooth(s, squares, running, i)
            v = torch.where(n > 0, v, running)
            r = ((v + self.eps) / (running + self.eps)).sqrt().clamp(1 / LARGEST_COMPENSATION, LARGEST_COMPENSATION)
            r = torch.where((i + 1 <= max(COMPENSATED_AFTER, self.warmup)) | skip, 1.0, r)
        y = Unified.apply(rows, self.gain, self.bias, v + self.eps, r, gradients, e, i + 1, skip, n, self)
        self.observe(s.unsqueeze(0), n)
        return from_rows(y, x, self.axis)

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(a, c) of eval's y = a x + c."""
        return self.gain * torch.rsqrt(self.running_square + self.eps), self.bias

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        squares, v, skip, outlier = self._smooth(statistics[0], self.squares, self.running_square, self.steps)
        self.replace("squares", squares, seen)
        self.replace("running_square", self.momentum * self.running_square + (1 - self.momentum) * v, seen)
        self.replace("skipped", skip, seen)
        self.skips += seen & outlier
        self.steps += seen

    def update_gradient(self, statistics: Tensor, seen: Tensor, *call: Tensor) -> None:
        i, skip = call or (self.steps, self.skipped)
        gradients, _, e = self.smooth_gradient(statistics[0], self.gradients, self.running_gradient, i, skip)
        self.replace("gradients", gradients, seen)
        self.replace("running_gradient", e, seen)

    def _smooth(self, s: Tensor, squares: Tensor, running: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The next window, v, whether the step is skipped, and whether an outlier is the reason; i: steps before."""
        size, i = len(squares), i + 1
        slot = (torch.arange(size, device=s.device) == i % size).unsqueeze(1)
        filled = torch.where(slot, s, squares)
        outlier = torch.zeros_like(i, dtype=torch.bool)
        if self.filtration and size > 1:  # of one entry both means are the same, up to rounding
            excess = filled.mean(0) - geometric_mean(filled)
            outlier = (i >= self.warmup) & (excess > size * squares.sqrt().var()).any()
            filled = torch.where(slot & outlier, running, filled)
        skip = outlier | (size <= 1)
        v = torch.where((i <= size) | (i < self.warmup) | skip, s, geometric_mean(filled))
        return filled, v, skip, outlier

    def smooth_gradient(
        self, gradient: Tensor, gradients: Tensor, e: Tensor, i: Tensor, skip: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next window of gradients, G' and the next e; i: the step that is being made."""
        size = len(gradients)
        slot = (torch.arange(size, device=e.device) == i % size).unsqueeze(1)
        filled = torch.where(slot, torch.where(skip, e, gradient), gradients)
        smooth = torch.where((i <= size) | (i < self.warmup) | skip, gradient, filled.mean(0))
        return filled, smooth, self.momentum * e + (1 - self.momentum) * smooth

    def extra_repr(self) -> str:
        window = [len(self.squares), len(self.gradients)]
        return f"{len(self.gain)}, window={window}, warmup={self.warmup}, count={self.count}"


class Unified(torch.autograd.Function):
    """y = gain · x/sqrt(v) + bias and Unified Normalization's own backward, whose statistic goes to the layer.

    x: (N, C); v: with eps; r: compensation of the gradient; gradients, e, i, skip: the layer's state as the forward saw
    it, i counting this step; n: how many rows counted in the forward.
    """

    @staticmethod
    def forward(ctx, x, gain, bias, v, r, gradients, e, i, skip, n, layer: UnifiedNorm):
        scale, y = gain * torch.rsqrt(v), torch.empty_like(x)
        for block, out in blocks(x, y):
            out.copy_(torch.addcmul(bias, block.to(wide(x.dtype)), scale))
        ctx.save_for_backward(x, gain, v, r, gradients, e, i, skip, n)
        ctx.layer = layer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, gain, v, r, gradients, e, i, skip, n = ctx.saved_tensors
        layer, inverse = ctx.layer, torch.rsqrt(v)
        along, total = torch.zeros_like(v), torch.zeros_like(v)
        for block, g in blocks(x, gy):
            g = g.to(v.dtype)
            along += (g * block.to(v.dtype)).sum(0)
            total += g.sum(0)
        g_gain = along * r * inverse
        mean, rows = over_ranks(layer.sync, g_gain * gain, number(x, None))
        mean = mean / rows.clamp(min=1)
        _, smooth, e = layer.smooth_gradient(mean, gradients, e, i, skip)
        layer.observe_gradient(mean.unsqueeze(0), torch.where(n > 0, rows, 0.0), i, skip)

        scale, pull = gain * r * inverse, torch.where(skip, smooth, e) * inverse.square()
        gx = torch.empty_like(x)
        for block, g, out in blocks(x, gy, gx):
            out.copy_(torch.addcmul(g.to(v.dtype) * scale, block.to(v.dtype), pull, value=-1))
        return gx, g_gain, total, *(None,) * 8


def geometric_mean(squares: Tensor) -> Tensor:
    """Over the window, per channel."""
    return squares.log().mean(0).exp()
