"""Compressed RMSNorm, for a stream that leaves out a channel (Jiang et al., NeurIPS 2023, arXiv:2305.14858)."""

from torch import Tensor

from trainkit.norm_layer.rowwise import RowNorm, mean_square


class CRMSNorm(RowNorm):
    """y = x / sqrt((sum(x²) + sum(x)²) / d + eps), sums over the d - 1 = `width` stored channels; no parameter.

    A row of d channels whose mean is zero is known from d - 1 of them: the last is minus the sum of the others. y is
    what RMSNorm makes of the full row, without the last channel. A trained Pre-LN model has such a twin; a model
    trained with this layer from the start is a different parametrization.
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-5):
        super().__init__(width, axis=axis, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_rows(x)

    def scale(self, x: Tensor, total: Tensor) -> Tensor:
        return ((self.width * mean_square(x) + total.square()) / (self.width + 1) + self.eps).rsqrt()

    def formula(self, x: Tensor) -> Tensor:
        return x * self.scale(x, x.sum(-1, keepdim=True))

    def gradient(self, x: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
        total = x.sum(-1, keepdim=True)
        r = self.scale(x, total)
        slope = (gy * x).sum(-1, keepdim=True) * r**3 / (self.width + 1)  # dr/dx = -r³ (x + total) / d
        return ((gy * r).addcmul_(x, slope, value=-1).sub_(slope * total),)
