"""Sandwich-LN (CogView, Ding et al. 2021, arXiv:2105.13290): Peri-LN without the norm on the embedding."""

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class Sandwich(Placement):
    """h <- h + N_out(f(N_in(h))); y = N(h).                    h ──┬── N ── f ── N ── + ──►
                                                                    └─────────────────┘
    Also the placement of Gemma 2. CogView further divides by max |x| before the statistics, which changes nothing in
    exact arithmetic; here the norm layers compute in at least float32 instead.
    """

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, pre=self.norm(site), out=self.norm(site))

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
