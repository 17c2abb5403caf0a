"""LayerNorm Scaling (Sun et al., NeurIPS 2025, arXiv:2502.05795): Pre-LN with outputs divided by sqrt(layer)."""

from math import sqrt

from torch import Tensor, nn

from trainkit.norm.placement import Placement, Residual, Site


class Scaled(nn.Module):
    """factor · norm(x), a constant after the norm's gain."""

    def __init__(self, norm: nn.Module, factor: float):
        super().__init__()
        self.norm, self.factor = norm, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.factor

    def extra_repr(self) -> str:
        return f"factor={self.factor:g}"


class LNS(Placement):
    """h <- h + f(N(h) / sqrt(l)), l = 1 … depth the block; y = N(h), unscaled.

    Both norms of a block use the same l; residual and final norm are not scaled; no parameter is added. It bounds the
    growth of the stream's variance, so deep blocks keep contributing. Initialization must be plain: with
    depth-scaled output weights the two corrections add up (the YAML sets model.init=plain). In the authors' released
    code this branch cannot be reached (a selector in lower case is compared with "LNS"); the equation is the paper's.
    """

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        layer = site.located("norm=lns").layer
        return Residual(f, pre=Scaled(self.norm(site), 1 / sqrt(layer + 1)))

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
