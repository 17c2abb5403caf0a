"""Pre-LN (Xiong et al. 2020, arXiv:2002.04745): the norm on the input of every sublayer, and one before the head."""

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class Pre(Placement):
    """h <- h + f(N(h)); y = N(h).                              h ──┬── N ── f ── + ──►
                                                                    └────────────┘
    The stream itself is never normalized, so its variance grows with depth; the identity path keeps gradients alive.
    """

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, pre=self.norm(site))

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
