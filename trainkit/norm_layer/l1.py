"""L1 normalization: LayerNorm by the mean absolute deviation (quantized training: 2024, arXiv:2411.10948)."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import RowNorm, over_rows


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

    def forward(self, x: Tensor) -> Tensor:
        return self.by_rows(x, self.gain, self.bias)

    def scale(self, c: Tensor) -> Tensor:
        return (self.constant * c.abs().mean(-1, keepdim=True) + self.eps).reciprocal()

    def formula(self, x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        c = x - x.mean(-1, keepdim=True)
        return torch.addcmul(bias, c * self.scale(c), gain)

    def gradient(self, x: Tensor, gy: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        c = x - x.mean(-1, keepdim=True)
        r = self.scale(c)
        p = gy * c
        slope = (p @ gain).unsqueeze(-1) * r * (self.constant / self.width)
        s, g = c.sign(), gy * gain
        shift = g.mean(-1, keepdim=True) - slope * s.mean(-1, keepdim=True)
        return g.addcmul_(s, slope, value=-1).sub_(shift).mul_(r), over_rows(p.mul_(r)), over_rows(gy)
