"""SeeDNorm, an RMSNorm whose gain depends on the input's size (Cai et al., ICLR 2026, arXiv:2510.22777)."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import RowNorm, mean_square, over_rows, rms_gradient


class SeeDNorm(RowNorm):
    """y = (tanh(<x, beta>) alpha + gain) · x / sqrt(mean(x²) + eps); alpha, beta, gain: (width,), start at 1, 0, 1.

    The product is per row over the x that came in, so what RMSNorm forgets, the size of x, can act again; at the
    start y is RMSNorm's. `heads` cuts x, beta and alpha into that many neighbouring slices with a product each, while
    the mean square stays that of all channels (vision: 16 heads for ViT-B, 1 diverged there). The paper decays alpha
    and beta (optimizer.decay=[matrix,embed,head,vector] does, though it takes the gain along). Left out are its
    extras for vision, dropout on the dynamic term and its division by the width. Raises ValueError on heads that do
    not divide the width. No official code exists.
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-6, heads: int = 1):
        super().__init__(width, axis=axis, eps=eps)
        if heads < 1 or width % heads:
            raise ValueError(f"norm_layer.heads must divide the {width} channels; got {heads}. Try norm_layer.heads=1")
        self.heads = heads
        self.gain, self.alpha = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.by_rows(x, self.gain, self.alpha, self.beta)

    def sliced(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))

    def formula(self, x: Tensor, gain: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        s = self.sliced(x * beta).sum(-1, keepdim=True).tanh()  # (…, heads, 1)
        factor = torch.addcmul(self.sliced(gain), s, self.sliced(alpha)).flatten(-2)
        return x * (mean_square(x) + self.eps).rsqrt() * factor

    def gradient(self, x: Tensor, gy: Tensor, gain: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        s = self.sliced(x * beta).sum(-1, keepdim=True).tanh()
        factor = torch.addcmul(self.sliced(gain), s, self.sliced(alpha)).flatten(-2)
        r = (mean_square(x) + self.eps).rsqrt()
        gfactor = (x * r).mul_(gy)
        gz = self.sliced(gfactor * alpha).sum(-1, keepdim=True) * (1 - s.square())  # of the product <x, beta>
        galpha = over_rows(self.sliced(gfactor) * s).flatten()
        gbeta = over_rows(self.sliced(x) * gz).flatten()
        (gx,) = rms_gradient(x, factor.mul_(gy), r)
        self.sliced(gx).addcmul_(gz, self.sliced(beta))
        return gx, over_rows(gfactor), galpha, gbeta

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}"
