"""Dynamic tanh in place of normalization (Zhu et al., CVPR 2025, arXiv:2503.10622)."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import RowNorm, over_rows


class DynamicTanh(RowNorm):
    """y = gain · tanh(alpha x) + bias, element by element; gain, bias: (width,), start at 1, 0; alpha: (1,).

    No statistic at all, so no reduction; but the scale of x matters, and where |alpha x| is large the gradient
    vanishes. It tolerates less learning rate than a norm (arXiv:2601.22966). LLaMA in the paper: `bias=False` and
    alpha by site, 0.8 before attention and 0.2 elsewhere at 7B, less in wider models; here all sites share `alpha`.
    """

    def __init__(self, width: int, *, axis: int = -1, alpha: float = 0.5, bias: bool = True):
        super().__init__(width, axis=axis)
        self.alpha = nn.Parameter(torch.full((1,), float(alpha)))
        self.gain = nn.Parameter(torch.ones(width))
        self.register_parameter("bias", nn.Parameter(torch.zeros(width)) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_rows(x, self.alpha, self.gain, self.bias)

    def formula(self, x: Tensor, alpha: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
        t = (alpha * x).tanh()
        return t * gain if bias is None else torch.addcmul(bias, t, gain)

    def gradient(
        self, x: Tensor, gy: Tensor, alpha: Tensor, gain: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        t = (alpha * x).tanh_()
        gt = gy * t
        ggain = over_rows(gt)
        g = torch.addcmul(gy, gt, t, value=-1).mul_(gain)  # gy · gain · (1 - t²)
        galpha = torch.dot(g.flatten(), x.flatten()).view(1)
        return g.mul_(alpha), galpha, ggain, *([] if bias is None else [over_rows(gy)])
