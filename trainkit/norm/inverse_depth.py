"""Inverse-depth residuals (Dherin & Munn 2025, arXiv:2510.03470): a constant in the place of every norm."""

from collections.abc import Callable

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class InverseDepth(Placement):
    """h <- h + f(h) / n^power, n the number of sublayers; no norm anywhere, nothing learned.    h ──┬── f/n ── + ──►
                                                                                                     └──────────┘
    Expanding the n residuals gives C(n, k) paths of order k, so plain addition can grow like 2^n; the factor 1/n
    (power=1) bounds the sum by e, 1/sqrt(n) (power=0.5) is the milder choice. norm_layer is not used.
    Raises ValueError where the number of sublayers is unknown.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, power: float = 1.0):
        super().__init__(norm_layer)
        if not power >= 0:
            raise ValueError(f"norm.power must not be negative; got {power}. Try 1 (1/n) or 0.5 (1/sqrt(n))")
        self.power = power

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, scale=site.located("norm=inverse_depth").count ** -self.power)
