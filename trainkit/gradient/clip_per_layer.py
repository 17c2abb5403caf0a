"""Clipping every parameter tensor by its own norm."""

from math import sqrt

import torch
from torch import Tensor

from trainkit.gradient.scale import scale_
from trainkit.measure.gradient_norms import norms


class ClipPerLayer:
    """g_i <- g_i · min(1, max_norm / (‖g_i‖ + 1e-6)) for every parameter tensor i; in place, one foreach pass.

    One exploding layer is cut without making the others' steps small, as clipping by the global norm does; the whole
    gradient may turn. relative=True: the limit is max_norm · sqrt(entries of g_i), so max_norm bounds the RMS of the
    entries, whatever a layer's size. A tensor with a non-finite norm stays non-finite.
    Returns {"grad_norm/clipped": the norm of everything afterwards}.
    """

    def __init__(self, max_norm: float = 1.0, *, relative: bool = False):
        if not max_norm > 0:
            raise ValueError(f"gradient.max_norm must be positive; got {max_norm}. Try gradient=none for no clipping")
        self.max_norm, self.relative = max_norm, relative

    def __call__(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        lengths = norms(gradients)
        limits = [self.max_norm * (sqrt(g.numel()) if self.relative else 1.0) for g in gradients]
        factors = (lengths.new_tensor(limits) / (lengths + 1e-6)).clamp(max=1.0)
        scale_(gradients, factors)
        return {"grad_norm/clipped": torch.linalg.vector_norm(lengths * factors)}
