"""PreAffineRMSNorm, RMSNorm with a gain on its input too (Qiu et al. 2026, arXiv:2601.22966)."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import RowNorm, mean_square, over_rows, rms_gradient


class PreAffineRMSNorm(RowNorm):
    """y = gain · z / sqrt(mean(z²) + eps), z = pre_gain · x; both gains: (width,), start at 1.

    The input gain can shrink a channel of massive activations before it enters the mean square, so the stream need
    not grow one to silence a row (2B model: largest activation 640 against 2800).
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-6):
        super().__init__(width, axis=axis, eps=eps)
        self.gain, self.pre_gain = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.by_rows(x, self.gain, self.pre_gain)

    def formula(self, x: Tensor, gain: Tensor, pre_gain: Tensor) -> Tensor:
        z = x * pre_gain
        return z * (mean_square(z) + self.eps).rsqrt() * gain

    def gradient(self, x: Tensor, gy: Tensor, gain: Tensor, pre_gain: Tensor) -> tuple[Tensor, ...]:
        z = x * pre_gain
        gz, ggain = rms_gradient(z, gy, (mean_square(z) + self.eps).rsqrt(), gain)
        return gz * pre_gain, ggain, over_rows(gz * x)
