"""Post-LN (Vaswani et al. 2017, arXiv:1706.03762): the norm on the sum of the residual connection."""

from collections.abc import Callable

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class Post(Placement):
    """h <- N(h + f(h)).                                        h ──┬── f ── + ── N ──►
                                                                    └────────┘
    Every row of the stream has unit variance; gradients shrink towards the input, so training needs warm-up.
    The original has no norm before the head; `final=True` adds the one that the Mix-LN and LNS code bases keep.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, final: bool = False):
        super().__init__(norm_layer)
        self.final = final

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, post=self.norm(site))

    def after(self, site: Site) -> nn.Module:
        return self.norm(site) if self.final else nn.Identity()
