"""PN-V (Shen et al., ICML 2020, arXiv:2003.07845): batch normalization without centring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.channels import Standardize, affine, from_rows, to_rows, valid_rows
from trainkit.norm_layer.stateful import Stateful, statistic


class PowerNormV(Stateful):
    """y = gain · x/sqrt(s + eps) + bias; s (width,) = mean over tokens of x², the gradient through s included.

    PowerNorm's first stage: the quadratic mean of a batch of language varies less than its mean and variance do. The
    paper gives no statistic for eval: here it is a running mean of s, running <- (1 - momentum) running + momentum s,
    from 1, as in batch normalization. Padding does not count in s; a batch of padding alone uses the running mean.
    Leaks the future in training.
    """

    running_square: Tensor

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-5,
        momentum: float = 0.1,
        count: str = "step",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        self.axis, self.eps, self.momentum = axis, eps, momentum
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("running_square", statistic(width, fill=1.0))
        self.expect_statistics(1, width)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x: `width` channels on `axis`; pad_mask: x's shape without them, True at padding -> y, of x's shape."""
        if not self.training:
            return affine(x, *self.scale_shift(), self.axis)
        rows, valid, s = to_rows(x, self.axis, len(self.gain)), valid_rows(pad_mask, x, self.axis), self.running_square
        y, _, s, n = Standardize.apply(rows, self.gain, self.bias, None, s, valid, self.eps, self.sync)
        self.observe(s.unsqueeze(0), n)
        return from_rows(y, x, self.axis)

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(a, c) of eval's y = a x + c."""
        return self.gain * torch.rsqrt(self.running_square + self.eps), self.bias

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        self.replace("running_square", torch.lerp(self.running_square, statistics[0], self.momentum), seen)

    def extra_repr(self) -> str:
        return f"{len(self.gain)}, momentum={self.momentum}, count={self.count}"
