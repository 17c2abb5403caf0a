"""ReZero (Bachlechner et al. 2020, arXiv:2003.04887): a learned scalar on every branch, starting at zero; no norm."""

from collections.abc import Callable

import torch
from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class ReZero(Placement):
    """h <- h + a · f(h), a a learned scalar per sublayer.      h ──┬── f ── a ── + ──►
                                                                    └─────────────┘
    With a = 0 the network starts as the identity: in the first step only the scalars and the two ends receive a
    gradient. norm_layer is not used. init=1/sqrt(depth) gives SkipInit without norms (De & Smith 2020).
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, init: float = 0.0):
        super().__init__(norm_layer)
        self.init = init

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, scale=nn.Parameter(torch.full((1,), float(self.init))))
