"""Spectral normalization after every step, where it is needed (as in Newhouse et al. 2025, arXiv:2507.13338)."""

from collections.abc import Hashable

from torch import Tensor

from trainkit.projection.constraint import SpectralConstraint, at_least_one
from trainkit.projection.spectral import POWER_ITERATIONS, spectral_normalize


class SpectralNormalize(SpectralConstraint):
    """W / c' <- (W / c') / max(1, s), s its largest singular value by power iteration.

    All singular values come down together where the largest one is above the bound (w_max c, or c without
    `sensitive_to_wmax`). The iteration starts from a fixed vector and finds s from below, so the bound is met as
    closely as the top stands out: within some percent for random matrices. The authors' NanoGPT takes 26 iterations.
    """

    def __init__(
        self,
        *,
        w_max: float = 1.0,
        sensitive_to_wmax: bool = True,
        iterations: int = POWER_ITERATIONS,
        rms_max: float | None = 1.0,
        start: str = "clip",
    ):
        super().__init__(w_max=w_max, sensitive_to_wmax=sensitive_to_wmax, rms_max=rms_max, start=start)
        self.iterations = at_least_one(iterations)

    def constrain(self, w: Tensor, unit: float, setting: Hashable) -> Tensor:
        return spectral_normalize(w, unit, iterations=self.iterations)
