"""Hard cap on singular values by polynomials (Newhouse et al. 2025, arXiv:2507.13338): about min(w_max, s)."""

from collections.abc import Hashable

from torch import Tensor

from trainkit.projection.constraint import SpectralConstraint
from trainkit.projection.spectral import hard_cap


class HardCap(SpectralConstraint):
    """s <- about min(1, s) for the singular values s of W / c': four odd polynomials, products of matrices only.

    Off by 0.034 at most and never above 1.011, for s up to 3.5; values near 1 come down to 0.966, so the map is not
    idempotent and also decays what is under the bound. From 4 on it breaks down: a step may at most triple the bound.
    Without `sensitive_to_wmax` the cap is at c, whatever w_max.
    """

    def constrain(self, w: Tensor, unit: float, setting: Hashable) -> Tensor:
        return hard_cap(w, unit)
