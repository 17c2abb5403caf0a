"""OLMo 2's reordered norm (OLMo team 2025, arXiv:2501.00656): on the output of every sublayer, none before it."""

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class Output(Placement):
    """h <- h + N(f(h)); y = N(h).                              h ──┬── f ── N ── + ──►
                                                                    └────────────┘
    Each sublayer adds a vector of fixed mean square. Sublayers read the raw stream, so OLMo 2 also normalizes queries
    and keys over their full width: model.qk_norm=full.
    """

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, out=self.norm(site))

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
