"""Batch normalization (Ioffe & Szegedy, ICML 2015, arXiv:1502.03167), for tokens and for images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from trainkit.norm_layer.channels import Standardize, from_rows, synchronized, to_rows, valid_rows
from trainkit.norm_layer.stateful import Stateful, wide


def batch(
    width: int,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    count: str = "call",
    sync: str = "none",
) -> BatchNorm:
    """A BatchNorm of `width` channels on `axis`; for images, axis=1, one that is a torch.nn.BatchNorm2d as well."""
    kind = BatchNorm2d if axis == 1 else BatchNorm
    return kind(width, axis=axis, eps=eps, momentum=momentum, count=count, sync=sync)


class BatchNorm(Stateful, _BatchNorm):
    """y = weight · (x - mean)/sqrt(var + eps) + bias per channel, mean and var over batch and tokens (or pixels).

    In eval they are the running ones: running <- (1 - momentum) running + momentum · batch's, from 0 and 1; the batch's
    var is unbiased there and biased in y. momentum=None: the plain mean of all updates. Numbers, names and the counting
    are those of torch.nn.BatchNorm1d and 2d: every training forward is an update, unless count="step".
    Beyond torch's: padding does not count in the statistics; fewer than two positions per channel, where torch raises,
    are normalized by the running statistics and change nothing; a forward that activation checkpointing repeats
    changes nothing; sync="mean" works on every device.
    Leaks the future in training: a causal model's tokens are centred by later ones.
    """

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__(width, eps=eps, momentum=momentum, count=count, sync=sync)
        self.axis = axis
        for name in ("running_mean", "running_var"):  # half precision may be the default dtype
            setattr(self, name, getattr(self, name).to(wide(torch.get_default_dtype())))
        self.expect_statistics(2, width)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x: channels on `axis`; pad_mask: x's shape without them, True at padding -> y, of x's shape."""
        if self.training or self.running_mean is None:
            y, statistics, n = self.normalize(x, pad_mask)
            if self.training and self.track_running_stats:
                self.observe(statistics, n)
            return y
        rows = self._channels_second(x)
        y = F.batch_norm(rows, self.running_mean, self.running_var, *self._weights(x), False, 0.0, self.eps)
        return y if rows is x else from_rows(y, x, self.axis)

    def normalize(self, x: Tensor, pad_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y by the batch's own statistics; these, mean and unbiased variance (2, width); the number of positions.

        The number is 0 where there are fewer than two.
        """
        weight, bias = self._weights(x)
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)
        positions = x.numel() // self.num_features
        if pad_mask is None and positions > 1 and not synchronized(self.sync):
            rows = self._channels_second(x)
            # With momentum 1 torch's kernel leaves the batch's own statistics in the running ones.
            y = F.batch_norm(rows, mean, var, weight, bias, True, 1.0, self.eps)
            n = torch.full_like(mean[0], positions)
            return y if rows is x else from_rows(y, x, self.axis), torch.stack([mean, var]).detach(), n

        if self.running_mean is not None and self.running_var is not None:
            mean, var = self.running_mean, self.running_var
        rows, valid = to_rows(x, self.axis, self.num_features), valid_rows(pad_mask, x, self.axis)
        y, mean, var, n = Standardize.apply(rows, weight, bias, mean, var, valid, self.eps, self.sync)
        n = torch.where(n > 1, n, 0.0)
        return from_rows(y, x, self.axis), torch.stack([mean, var * n / (n - 1)]), n

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(a, c) of eval's y = a x + c."""
        if self.running_mean is None or self.running_var is None:
            raise ValueError("a BatchNorm without running statistics has no fixed affine map; set track_running_stats")
        a = self.weight * torch.rsqrt(self.running_var + self.eps)
        return a, self.bias - a * self.running_mean

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        self.num_batches_tracked += seen  # type: ignore[operator]
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum  # type: ignore[operator]
        for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
            self.replace(name, (1 - momentum) * getattr(self, name) + momentum * value, seen)

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """weight and bias in the precision of the statistics."""
        return self.weight.to(wide(x.dtype)), self.bias.to(wide(x.dtype))

    def _channels_second(self, x: Tensor) -> Tensor:
        """x itself where the channels are on axis 1, as torch's kernels want them; else rows of tokens."""
        return x if x.dim() > 1 and self.axis % x.dim() == 1 else to_rows(x, self.axis, self.num_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, count={self.count}"


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """The same where the channels are on axis 1; what looks for torch.nn.BatchNorm2d finds it."""
