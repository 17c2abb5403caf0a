"""Singular values cut at w_max, exactly (Newhouse et al. 2025, arXiv:2507.13338)."""

from collections.abc import Hashable

from torch import Tensor

from trainkit.projection.constraint import SpectralConstraint
from trainkit.projection.spectral import svd_clip


class SVDClip(SpectralConstraint):
    """s <- min(s, w_max) for the singular values s of W / c'.

    The projection in the Frobenius norm onto the matrices within the bound; it changes nothing below. An
    eigendecomposition per matrix and step: the most expensive of the constraints, and one for which the host waits.
    It clips at w_max itself, so `sensitive_to_wmax`, with c' = c w_max, would clip at c w_max²; off by default.
    """

    def __init__(
        self, *, w_max: float = 1.0, sensitive_to_wmax: bool = False, rms_max: float | None = 1.0, start: str = "clip"
    ):
        super().__init__(w_max=w_max, sensitive_to_wmax=sensitive_to_wmax, rms_max=rms_max, start=start)

    def bound(self) -> float:
        return self.w_max

    def constrain(self, w: Tensor, unit: float, setting: Hashable) -> Tensor:
        return svd_clip(w, self.w_max, unit)
