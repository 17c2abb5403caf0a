"""Peri-LN (Kim et al., ICML 2025, arXiv:2502.02732): norms on the input and on the output of every sublayer."""

from collections.abc import Callable

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class Peri(Placement):
    """h <- h + N_out(f(N_in(h))); h_0 = N(embedding); y = N(h).   h ──┬── N ── f ── N ── + ──►
                                                                       └─────────────────┘
    Each sublayer adds a vector of fixed mean square, so the stream's variance grows linearly with depth, and the
    output norm cancels massive activations in the gradient. `embed=False` leaves out the embedding norm (optional in
    the paper; without it this is Sandwich-LN, as in Gemma 2).
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, embed: bool = True):
        super().__init__(norm_layer)
        self.embed = embed

    def before(self, site: Site) -> nn.Module:
        return self.norm(site) if self.embed else nn.Identity()

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, pre=self.norm(site), out=self.norm(site))

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
