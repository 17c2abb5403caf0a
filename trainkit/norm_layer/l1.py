"""L1 normalization: LayerNorm by the mean absolute deviation (quantized training: 2024, arXiv:2411.10948)."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import RowNorm


class L1Norm(RowNorm):
    """y = gain · c / (constant · mean|c| + eps) + bias, c = x - mean(x), means over channels; gain, bias start at 1, 0.

    Without squares and roots, which integer arithmetic lacks. constant = sqrt(pi/2) makes y of normally distributed
    rows equal LayerNorm's (Hoffer et al. 2018, arXiv:1803.01814); at 1 the mean of |y| is one. The paper's own
    equation was not at hand: the place of eps and the constant 1 are this project's choice. sign(0) = 0 in gradients.
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-6, constant: float = 1.0):
        super().__init__(width, axis=axis, eps=eps)
        if constant <= 0:
            raise ValueError(f"norm_layer.constant multiplies a deviation, so it is positive; got {constant}. Try 1.0")
        self.constant = constant
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def deviation(self, c: Tensor) -> Tensor:
        return self.constant * c.abs().mean(-1, keepdim=True) + self.eps

    def formula(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return c / self.deviation(c) * gain + bias

    def gradient(self, x: Tensor, gy: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        c = x - x.mean(-1, keepdim=True)
        s = self.deviation(c)
        p = gy * c
        slope = (p @ gain).unsqueeze(-1) * (self.constant / self.width) / s
        gc = (gy * gain).addcmul_(c.sign(), slope, value=-1).div_(s)
        return gc.sub_(gc.mean(-1, keepdim=True)), p.div_(s).sum(0), gy.sum(0)
