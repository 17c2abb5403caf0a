"""Batch renormalization (Ioffe, NeurIPS 2017): batch statistics on a leash."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm_layer.channels import over_ranks
from trainkit.norm_layer.stateful import Stateful, statistic, wide
from trainkit.norm_layer.weighted import Groups, from_samples, moments, normalize, statistics, to_samples


class BatchRenorm(Stateful):
    """y = weight · ((x - mean_B)/std_B · r + d) + bias; in training the batch's statistics, drawn to the running ones:
        std_B = sqrt(var_B + eps);   r = clip(std_B/std, 1/R, R);   d = clip((mean_B - mean)/std, -D, D)
        then mean <- mean + momentum (mean_B - mean);   std <- std + momentum (std_B - std)
    per channel, var_B biased, over batch and positions. r and d carry no gradient. In eval y = weight (x - mean)/std +
    bias, with no further eps. Where nothing is clipped, training computes what eval does, so small and unbalanced
    batches do less harm; R = 1, D = 0 is BatchNorm. The state is the mean of std (buffer running_std), as in the
    paper; ports that keep a running_var differ a little.
    R is r_max and D is d_max after a ramp, linear in the steps made so far: from 1 to r_max over r_ramp = [start, end],
    from 0 to d_max over d_ramp. The defaults are the paper's, for some 100000 steps; a shorter training that keeps them
    is BatchNorm up to the ramp's start. momentum=None: the plain mean of all updates.
    Fewer than two positions per channel are normalized by the running statistics and change nothing.
    count="step": an update per optimizer step, by the mean over its forwards; "call": one per training forward.
    sync="mean": over the samples of all ranks. Leaks the future in training.
    """

    reads = ("running_mean", "running_std", "steps")
    running_mean: Tensor
    running_std: Tensor
    steps: Tensor

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_ramp: Sequence[int] = (5000, 40000),
        d_ramp: Sequence[int] = (5000, 25000),
        count: str = "step",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        if r_max < 1 or d_max < 0:
            raise ValueError(f"batch_renorm needs r_max of at least 1 and d_max of at least 0; got {r_max} and {d_max}")
        for name, ramp in (("r_ramp", r_ramp), ("d_ramp", d_ramp)):
            if len(ramp) != 2 or not 0 <= ramp[0] <= ramp[1]:
                raise ValueError(f"batch_renorm's {name} is [first step, last step] of a ramp; got {list(ramp)}")
        self.width, self.axis, self.eps, self.momentum = width, axis, eps, momentum
        self.r_max, self.d_max, self.r_ramp, self.d_ramp = r_max, d_max, tuple(r_ramp), tuple(d_ramp)
        self.expect_statistics(2, width)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", statistic(width))
        self.register_buffer("running_std", statistic(width, fill=1.0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """x: samples first, channels on `axis` -> y, of x's shape."""
        h = to_samples(x, self.axis, self.width)
        weight, bias = self.weight.to(wide(x.dtype)), self.bias.to(wide(x.dtype))
        if not self.training:
            y = F.batch_norm(h, self.running_mean, self.running_std.square(), weight, bias, False, 0.0, 0.0)
            return from_samples(y, x, self.axis)
        found, groups = moments(h), Groups()
        (n,) = over_ranks(self.sync, torch.full((), len(h), dtype=weight.dtype, device=x.device))
        s = (1 / n.clamp(min=1)).expand(len(h))
        stats, n = statistics(*found, s, groups, self.sync), n * h.shape[2]
        running_mean, running_std, steps = self.read(stats.mean.squeeze(0))
        constant = n < 2
        std = (stats.var + self.eps).sqrt()
        largest_r = 1 + (self.r_max - 1) * ramped(steps, self.r_ramp, n)
        largest_d = self.d_max * ramped(steps, self.d_ramp, n)
        r = torch.where(constant, 1.0, torch.clamp(std / running_std, 1 / largest_r, largest_r))
        d = torch.where(constant, 0.0, torch.clamp((stats.mean - running_mean) / running_std, -largest_d, largest_d))
        self.observe(torch.cat([stats.mean, std]), torch.where(constant, 0.0, n))

        stats = stats._replace(
            mean=torch.where(constant, running_mean, stats.mean),
            var=torch.where(constant, running_std.square() - self.eps, stats.var),
        )
        y = normalize(h, weight * r, bias + weight * d, s, found, stats, constant, groups, self.eps, self.sync)
        return from_samples(y, x, self.axis)

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(a, c) of eval's y = a x + c."""
        a = self.weight / self.running_std
        return a, self.bias - a * self.running_mean

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        self.steps += seen
        momentum = 1 / self.steps if self.momentum is None else self.momentum
        for name, value in zip(("running_mean", "running_std"), statistics, strict=True):
            old = getattr(self, name)
            self.replace(name, old + momentum * (value - old), seen)

    def extra_repr(self) -> str:
        return f"{self.width}, axis={self.axis}, r_max={self.r_max}, d_max={self.d_max}, count={self.count}"


def ramped(steps: Tensor, ramp: Sequence[int], like: Tensor) -> Tensor:
    """From 0 at the ramp's first step to 1 at its last."""
    first, last = ramp
    return ((steps.to(like.dtype) - first) / max(1, last - first)).clamp(0, 1) if last else torch.ones_like(like)
