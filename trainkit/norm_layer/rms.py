"""Root-mean-square normalization (Zhang & Sennrich, NeurIPS 2019, arXiv:1910.07467)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm_layer.rowwise import RowNorm, mean_square, rms_gradient


class RMSNorm(RowNorm):
    """y = gain · x / sqrt(mean(x²) + eps), the mean over channels; gain: (width,), starts at 1.

    Keeps a row's direction and fixes its length; unlike LayerNorm it does not centre and has no bias. eps stands
    inside the root: 1e-6 as in LLaMA (OLMo 2 takes 1e-5); the original release has x / (rms + 1e-8).
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-6):
        super().__init__(width, axis=axis, eps=eps)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # torch has a kernel there
            return self.back(F.rms_norm(self.rows(x), (self.width,), self.gain.to(x.dtype), self.eps))
        return self.by_rows(x, self.gain)

    def formula(self, x: Tensor, gain: Tensor) -> Tensor:
        return x * (mean_square(x) + self.eps).rsqrt() * gain

    def gradient(self, x: Tensor, gy: Tensor, gain: Tensor) -> tuple[Tensor, ...]:
        return rms_gradient(x, gy, (mean_square(x) + self.eps).rsqrt(), gain)
