"""Spectral weight decay (Newhouse et al. 2025, arXiv:2507.13338): the largest singular value decays, no other."""

from collections.abc import Hashable

from torch import Tensor

from trainkit.projection.constraint import SpectralConstraint, at_least_one
from trainkit.projection.spectral import POWER_ITERATIONS, spectral_decay


class SpectralDecay(SpectralConstraint):
    """W <- W - rate s u vᵀ, s, u, v the largest singular value and its vectors by power iteration.

    rate: per step, not multiplied by the learning rate. No bound: s settles where a step adds what the decay takes,
    at most at (singular value of an update) / rate for updates that always push the same direction.
    start: keep or orthogonal, as there is no bound to clip at.
    """

    def __init__(
        self,
        *,
        rate: float = 0.1,
        iterations: int = POWER_ITERATIONS,
        rms_max: float | None = 1.0,
        start: str = "keep",
    ):
        super().__init__(rms_max=rms_max, start=start)
        if start == "clip":
            raise ValueError(
                "projection=spectral_decay has no bound to clip at: projection.start is keep or orthogonal"
            )
        if not 0 <= rate <= 1:
            raise ValueError(f"projection.rate is a share of the largest singular value, in [0, 1]; got {rate}")
        self.rate, self.iterations = rate, at_least_one(iterations)

    def constrain(self, w: Tensor, unit: float, setting: Hashable) -> Tensor:
        return spectral_decay(w, self.rate, iterations=self.iterations)
