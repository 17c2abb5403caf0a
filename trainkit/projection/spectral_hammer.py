"""Spectral hammer (Newhouse et al. 2025, arXiv:2507.13338): the largest singular value is set, the others stay."""

from collections.abc import Hashable

from torch import Tensor

from trainkit.projection.constraint import SpectralConstraint, at_least_one
from trainkit.projection.spectral import POWER_ITERATIONS, spectral_hammer


class SpectralHammer(SpectralConstraint):
    """W / c' <- W / c' + (w_max - s) u vᵀ, s, u, v its largest singular value and vectors by power iteration.

    Made for AdamW, whose updates have a small stable rank: one direction at a time grows beyond the bound. It raises s
    where it is smaller than w_max, and it bounds nothing where several singular values exceed w_max at once, as after
    Muon's steps. With `sensitive_to_wmax`, c' = c w_max, it would set s to c w_max²; off by default.
    """

    def __init__(
        self,
        *,
        w_max: float = 1.0,
        sensitive_to_wmax: bool = False,
        iterations: int = POWER_ITERATIONS,
        rms_max: float | None = 1.0,
        start: str = "clip",
    ):
        super().__init__(w_max=w_max, sensitive_to_wmax=sensitive_to_wmax, rms_max=rms_max, start=start)
        self.iterations = at_least_one(iterations)

    def bound(self) -> float:
        return self.w_max

    def constrain(self, w: Tensor, unit: float, setting: Hashable) -> Tensor:
        return spectral_hammer(w, self.w_max, unit, iterations=self.iterations)
