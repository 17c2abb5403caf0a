"""Gradients of unit length in every parameter tensor (Yu et al. 2017, arXiv:1707.04822)."""

from math import isfinite, sqrt

from torch import Tensor

from trainkit.gradient.scale import scale_
from trainkit.measure.gradient_norms import norms


class NormalizePerLayer:
    """g_i <- scale · g_i / (n_i + eps) for every parameter tensor i; in place, one foreach pass.

    n_i = ‖g_i‖ (norm="l2", the paper's) or ‖g_i‖ / sqrt(entries) (norm="rms", entries of size about 1, so that large
    and small layers move alike). Layers learn at the same pace however gradients shrink or grow with depth; how large
    the gradient was is forgotten, so lr alone sets the length of the steps. A zero gradient stays zero, and one far
    below eps small; non-finite ones stay non-finite.
    """

    def __init__(self, norm: str = "l2", *, scale: float = 1.0, eps: float = 1e-8):
        if norm not in ("l2", "rms"):
            raise ValueError(f"gradient.norm is l2 or rms; got {norm!r}")
        for name, value in (("scale", scale), ("eps", eps)):
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"gradient.{name} must be positive; got {value}")
        self.norm, self.scale, self.eps = norm, scale, eps

    def __call__(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        lengths = norms(gradients)
        if self.norm == "rms":
            lengths = lengths / lengths.new_tensor([sqrt(g.numel()) for g in gradients])
        scale_(gradients, self.scale / (lengths + self.eps))
        return {}
