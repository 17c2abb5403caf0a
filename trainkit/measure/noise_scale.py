"""How noisy the gradient is: the noise scale of McCandlish et al. 2018, arXiv:1812.06162."""

from __future__ import annotations

import torch
from torch import Tensor


def noise_scale(small: Tensor, big: Tensor, *, samples: float, batch: float) -> dict[str, Tensor]:
    """{"trace": tr(Σ), "square": |G|², "scale": B_simple = tr(Σ) / |G|²}, 0-d, unbiased (appendix A.1 there).

    small: the mean of ‖g_j‖² over groups of `samples` samples; big: ‖ḡ‖² of the mean over `batch` samples, which they
    make up; so batch > samples. As E‖g_j‖² = |G|² + tr(Σ) / samples, and with `batch` for ḡ,
        |G|² = (batch · big - samples · small) / (batch - samples),
        tr(Σ) = (small - big) / (1 / samples - 1 / batch).
    Batches far below B_simple waste steps, batches far above it waste samples. Both estimates are noisy and |G|² may
    even come out negative, where the scale is infinite: average trace and square over many steps, then divide.
    """
    if not batch > samples > 0:
        raise ValueError(f"the noise needs groups smaller than the batch; got groups of {samples} in one of {batch}")
    square = (batch * big - samples * small) / (batch - samples)
    trace = (small - big) / (1 / samples - 1 / batch)
    return {"trace": trace, "square": square, "scale": torch.where(square > 0, trace / square, torch.inf)}
