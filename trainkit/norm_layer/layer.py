"""Layer normalization (Ba, Kiros & Hinton 2016, arXiv:1607.06450)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm_layer.rowwise import RowNorm, full_precision


class LayerNorm(RowNorm):
    """y = gain · (x - mean(x)) / sqrt(var(x) + eps) + bias, over channels, var biased; gain starts at 1, bias at 0.

    Invariant to x -> a x + c. `bias=False` leaves the bias out.
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-5, bias: bool = True):
        super().__init__(width, axis=axis, eps=eps)
        self.gain = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        # On a processor the kernel keeps its statistics in the dtype of the gain.
        dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
        gain, bias = self.gain.to(dtype), None if self.bias is None else self.bias.to(dtype)
        with full_precision(x):
            return self.back(F.layer_norm(self.rows(x), (self.width,), gain, bias, self.eps))
