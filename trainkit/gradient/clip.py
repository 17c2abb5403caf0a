"""Clipping by the global norm (Pascanu, Mikolov & Bengio 2013, arXiv:1211.5063)."""

import torch
from torch import Tensor

from trainkit.gradient.scale import scale_
from trainkit.measure.gradient_norms import norms


class Clip:
    """g <- g · min(1, max_norm / (‖g‖ + 1e-6)), ‖g‖ the L2 norm over all parameters; in place, one foreach pass.

    Returns {"grad_norm/clipped": the norm afterwards}. A non-finite norm leaves non-finite gradients, which the
    guard reports. Equal to torch.nn.utils.clip_grad_norm_; ours, so that it is legal with fused optimizers and in
    every precision.
    """

    def __init__(self, max_norm: float = 1.0):
        if not max_norm > 0:
            raise ValueError(f"gradient.max_norm must be positive; got {max_norm}. Try gradient=none for no clipping")
        self.max_norm = max_norm

    def __call__(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        norm = torch.linalg.vector_norm(norms(gradients))
        factor = (self.max_norm / (norm + 1e-6)).clamp(max=1.0)
        scale_(gradients, factor)
        return {"grad_norm/clipped": norm * factor}
