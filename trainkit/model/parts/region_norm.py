"""Region normalization (Yu et al., AAAI 2020), for inpainting: each side of a mask by statistics of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm_layer.channels import over_ranks
from trainkit.norm_layer.ranks import summed


def by_region(x: Tensor, mask: Tensor, eps: float, sync: str = "none") -> Tensor:
    """(x - m_r)/sqrt(v_r + eps · N/S_r) in each region r; x: (B, C, H, W), mask: (B, 1, H, W), boolean.

    m_r, v_r (biased): per channel over the S_r positions of the region in the whole batch, of N altogether; the other
    region may hold anything. eps grows as a region shrinks, as in the released code, which fills what is outside with
    the region's mean and normalizes over all positions. A region without positions does not matter.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    y = torch.zeros_like(x)
    for region in (mask, ~mask):
        with torch.no_grad():
            counts = torch.stack([region.sum(), torch.full_like(region.sum(), region.numel())]).to(x.dtype)
            total, counts = over_ranks(sync, torch.where(region, x, 0.0).sum((0, 2, 3)), counts)
            size, positions = counts.clamp(min=1)
            mean = (total / size).view(-1, 1, 1)
        centred = torch.where(region, x - mean, 0.0)
        # Where values are centred their mean takes no part in the variance's gradient, but it does in their own.
        gap = summed(sync, centred.sum((0, 2, 3))).view(-1, 1, 1) / size
        var = summed(sync, centred.square().sum((0, 2, 3))).view(-1, 1, 1) / size
        y = y + torch.where(region, (centred - gap) * (var + eps * positions / size).rsqrt(), 0.0)
    return y


class RegionNorm(nn.Module):
    """RN-B: y = m · RN(x) (1 + gamma_f) + (1 - m) · RN(x) (1 + gamma_b) + beta_f + beta_b, RN(x) = by_region(x, m).

    x: (B, width, H, W). m: (B, 1, H', W') or (1, 1, H', W'), 1 in the foreground, brought to H x W by the nearest
    neighbour. gamma and beta: (width,) for foreground and background, from 0. Both betas act on all positions, as in
    the released code. Keeps what fills a hole from shifting the statistics of what is given. By the batch's statistics
    in training and eval alike, without state: in eval, too, an image depends on its companions. sync="mean": the
    statistics of all ranks.
    """

    def __init__(self, width: int, *, eps: float = 1e-5, sync: str = "none"):
        super().__init__()
        self.eps, self.sync = eps, sync
        self.foreground_gamma, self.foreground_beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.background_gamma, self.background_beta = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.dim() != 4 or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, x.shape[0]):
            raise ValueError(
                f"RegionNorm needs images (B, C, H, W) and a mask (B, 1, H', W'); got {tuple(x.shape)} and "
                f"{tuple(mask.shape)}. Pass one channel with 1 in the foreground"
            )
        inside = (
            F.interpolate(mask.to(torch.float32), size=x.shape[2:], mode="nearest").expand(len(x), -1, -1, -1) > 0.5
        )
        y = by_region(x, inside, self.eps, self.sync)
        front, back, shift = (
            p.to(y.dtype).view(-1, 1, 1)
            for p in (self.foreground_gamma, self.background_gamma, self.foreground_beta + self.background_beta)
        )
        return torch.addcmul(shift, y, 1 + torch.where(inside, front, back)).to(x.dtype)


class LearnedRegionNorm(nn.Module):
    """RN-L: y = RN(x) · (1 + gamma(A)) + beta(A), A = sigmoid(attend([mean_c(x), max_c(x)])), RN by A >= threshold.

    x: (B, C, H, W) of any C; A: (B, 1, H, W); attend, gamma, beta: convolutions of one output channel and kernel x
    kernel, attend without a bias. The mask lets no gradient through; attend learns by gamma and beta. Finds the regions
    itself, for deep layers, where the input's mask has blurred. By the batch's statistics in training and eval alike.
    """

    def __init__(self, *, kernel: int = 7, threshold: float = 0.8, eps: float = 1e-5, sync: str = "none"):
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that the map keeps its size; got {kernel}. Try 7")
        self.threshold, self.eps, self.sync = threshold, eps, sync
        self.attend = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.gamma = nn.Conv2d(1, 1, kernel, padding=kernel // 2)
        self.beta = nn.Conv2d(1, 1, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"LearnedRegionNorm needs images (B, C, H, W); got {tuple(x.shape)}")
        attention = torch.sigmoid(self.attend(torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)))
        y = by_region(x, attention >= self.threshold, self.eps, self.sync)
        return torch.addcmul(self.beta(attention), y, 1 + self.gamma(attention)).to(x.dtype)
