"""PowerNorm (Shen et al., ICML 2020, arXiv:2003.07845): batch quadratic means, and gradients corrected by a memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainkit.norm_layer.channels import blocks, from_rows, number, only, over_ranks, to_rows, valid_rows
from trainkit.norm_layer.stateful import Stateful, statistic, wide

GROUP_EPS = 1e-5  # of the group scaling, whatever the layer's eps is


class PowerNorm(Stateful):
    """y = gain · z + bias; z = u/sqrt(s + eps) in the first `warmup` steps, u/sqrt(phi + eps) afterwards and in eval.

    u = x/sqrt(mean(x²) + 1e-5) per token over each of `groups` groups of channels; s (width,): mean of u² over tokens.
    State: phi (width,), running mean of s, from 1; e (width,), from 0; the step i, from 0. A step with statistic s:
        i <- i + 1;  if i < warmup: phi <- phi (i-1)/i + s/i;  then phi <- forward_decay phi + (1 - forward_decay) s.
    Backward, without gradients through s and phi; g = gain · gy; its mean is over all tokens, padding included:
        q = g - (1 - backward_decay) e z;  gu = q/sqrt(s + eps);  e <- e + mean(q z).
    Nothing is centred: the means of batches of language vary too much. e is updated by what the backward finds, in the
    unit of the loss's gradient, so a change of loss scale disturbs it. Leaks the future during warm-up.
    As in the released code and unlike the paper's algorithm 2: the backward divides by the batch's statistic even after
    warm-up, phi is updated twice during it, and the group scaling. The code counts calls instead of optimizer steps
    (count=call); its translation models set `warmup` to the LR's warm-up and `groups` to the number of heads.
    A batch of padding alone is divided by phi and leaves the state as it was.
    Raises ValueError where groups does not divide width.
    """

    reads = ("running_square", "running_gradient", "steps")
    running_square: Tensor
    running_gradient: Tensor
    steps: Tensor

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-5,
        groups: int = 1,
        warmup: int = 10000,
        forward_decay: float = 0.9,
        backward_decay: float = 0.9,
        count: str = "step",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        if groups < 1 or width % groups:
            raise ValueError(f"norm_layer.groups must divide the width {width}; got {groups}. Try norm_layer.groups=1")
        self.axis, self.eps, self.groups, self.warmup = axis, eps, groups, warmup
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_square", statistic(width, fill=1.0))
        self.register_buffer("running_gradient", statistic(width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.expect_statistics(1, width, gradient_rows=1)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x: `width` channels on `axis`; pad_mask: x's shape without them, True at padding -> y, of x's shape."""
        rows = to_rows(x, self.axis, len(self.gain))
        if not self.training:
            h = rows.to(wide(x.dtype))
            scale = self.gain * torch.rsqrt(self.running_square + self.eps)
            y = torch.addcmul(self.bias, scaled(h, inverse_rms(h, self.groups)), scale).to(x.dtype)
            return from_rows(y, x, self.axis)

        with torch.no_grad():
            inverse, square, n = self._statistics(rows, valid_rows(pad_mask, x, self.axis))
            phi, e, i = self.read(square)
            square = torch.where(n > 0, square, phi)
            divisor = torch.where(i < self.warmup, square, phi)
            pull = (1 - self.backward_decay) * e
        kernel = (inverse, divisor + self.eps, square + self.eps, pull, n, self.sync, self.observe_gradient)
        y = Power.apply(rows, self.gain, self.bias, *kernel)
        self.observe(square.unsqueeze(0), n)
        return from_rows(y, x, self.axis)

    def _statistics(self, rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Per token and group 1/rms, (N, groups, 1); per channel the mean of u² over the n rows that count; n."""
        dtype = wide(rows.dtype)
        inverse = torch.empty(len(rows), self.groups, 1, dtype=dtype, device=rows.device)
        total = torch.zeros(rows.shape[1], dtype=dtype, device=rows.device)
        for block, inv, v in blocks(rows, inverse, valid):
            h = block.to(dtype)
            inv.copy_(inverse_rms(h, self.groups))
            total += only(v, scaled(h, inv).square()).sum(0)
        total, n = over_ranks(self.sync, total, number(rows, valid))
        return inverse, total / n.clamp(min=1), n

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        s, phi, i = statistics[0], self.running_square, self.steps + 1
        cumulative = torch.where(i < self.warmup, phi * (i - 1) / i + s / i, phi)
        self.replace("running_square", self.forward_decay * cumulative + (1 - self.forward_decay) * s, seen)
        self.steps += seen

    def update_gradient(self, statistics: Tensor, seen: Tensor, *call: Tensor) -> None:
        self.replace("running_gradient", self.running_gradient + statistics[0], seen)

    def extra_repr(self) -> str:
        return f"{len(self.gain)}, groups={self.groups}, warmup={self.warmup}, count={self.count}"


class Power(torch.autograd.Function):
    """y = gain · u/sqrt(divisor) + bias and PowerNorm's own backward, whose statistic goes to `observe`.

    x: (N, C); u = x · inverse per group; square, divisor: mean squares with eps; pull: (1 - backward_decay) e; n: how
    many rows counted in the forward.
    """

    @staticmethod
    def forward(ctx, x, gain, bias, inverse, divisor, square, pull, n, sync: str, observe):
        scale, y = gain * torch.rsqrt(divisor), torch.empty_like(x)
        for block, inv, out in blocks(x, inverse, y):
            out.copy_(torch.addcmul(bias, scaled(block.to(inv.dtype), inv), scale))
        ctx.save_for_backward(x, gain, inverse, divisor, square, pull, n)
        ctx.sync, ctx.observe = sync, observe
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gy):
        x, gain, inverse, divisor, square, pull, n = ctx.saved_tensors
        to_z, to_gu = torch.rsqrt(divisor), torch.rsqrt(square)
        g_gain, g_bias, qz = torch.zeros_like(square), torch.zeros_like(square), torch.zeros_like(square)
        gx = torch.empty_like(x)
        for block, inv, g, out in blocks(x, inverse, gy, gx):
            u, g = scaled(block.to(inv.dtype), inv), g.to(inv.dtype)
            z = u * to_z
            g_gain += (g * z).sum(0)
            g_bias += g.sum(0)
            q = torch.addcmul(g * gain, z, pull, value=-1)
            qz += (q * z).sum(0)
            gu = q * to_gu
            along = (gu * u).unflatten(-1, (inv.shape[1], -1)).mean(-1, keepdim=True)
            out.copy_(scaled(gu - scaled(u, along), inv))
        qz, rows = over_ranks(ctx.sync, qz, number(x, None))
        ctx.observe((qz / rows).unsqueeze(0), torch.where(n > 0, rows, 0.0))
        return gx, g_gain, g_bias, *(None,) * 7


def inverse_rms(h: Tensor, groups: int) -> Tensor:
    """(N, C) -> 1/rms over each of `groups` groups of channels, (N, groups, 1)."""
    return torch.rsqrt(h.unflatten(-1, (groups, -1)).square().mean(-1, keepdim=True) + GROUP_EPS)


def scaled(h: Tensor, factor: Tensor) -> Tensor:
    """Rows (N, C) times one factor per token and group, (N, groups, 1)."""
    return (h.unflatten(-1, (factor.shape[1], -1)) * factor).flatten(-2)
