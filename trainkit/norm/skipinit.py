"""SkipInit on Pre-LN (De & Smith 2020, arXiv:2002.10444; with Pre-LN in Sun et al. 2025, arXiv:2502.05795)."""

from collections.abc import Callable

import torch
from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class SkipInit(Placement):
    """h <- h + a · f(N(h)), a a learned scalar per sublayer; y = N(h).     h ──┬── N ── f ── a ── + ──►
                                                                               └──────────────────┘
    a starts at `init` (null: 1/sqrt(L), L the number of blocks, as in the LNS paper; 0 is the other published value),
    so that branches start small beside the stream. For the norm-free original take norm=rezero with norm.init.
    Raises ValueError where init is null and depth is unknown.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, init: float | None = None):
        super().__init__(norm_layer)
        self.init = init

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        init = site.located("norm=skipinit").depth ** -0.5 if self.init is None else float(self.init)
        return Residual(f, pre=self.norm(site), scale=nn.Parameter(torch.full((1,), init)))

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
