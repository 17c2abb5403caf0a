"""SimpleRMSNorm, RMSNorm without a gain (Qin et al. 2023, TransNormerLLM, arXiv:2307.14995)."""

from torch import Tensor

from trainkit.norm_layer.rowwise import RowNorm, mean_square, rms_gradient


class SimpleRMSNorm(RowNorm):
    """y = x / sqrt(mean(x²) + eps), the mean over channels; no parameter.

    Without eps this is the paper's x sqrt(width) / |x|; eps, and its place in the root, are those of the authors'
    module.
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-6):
        super().__init__(width, axis=axis, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_rows(x)

    def formula(self, x: Tensor) -> Tensor:
        return x * (mean_square(x) + self.eps).rsqrt()

    def gradient(self, x: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
        return rms_gradient(x, gy, (mean_square(x) + self.eps).rsqrt())
