"""HybridNorm (Zhuo et al., NeurIPS 2025, arXiv:2503.04598): norms on q, k and v in attention, Post-Norm in the MLP."""

from collections.abc import Callable

from torch import Tensor, nn

from trainkit.norm.placement import Placement, Residual, Site


class Hybrid(Placement):
    """h <- h + A(h), where A normalizes its q, k and v per head; then u = N(h), h <- u + F(u); y = N(h).

        h ──┬── A(N q, N k, N v) ── + ── N ──┬── F ── + ──►
            └───────────────────────┘        └────────┘

    The MLP's residual branches off after the norm. The norms inside attention have the width of a head and stand
    before the rotation. `star=True` is HybridNorm*, which treats the first block apart: its attention has a norm on
    the input as well, and its MLP is Pre-LN (the residual branches off before the norm). The method of the title is
    star=False; the paper's largest runs use the star. Sublayers other than attention follow the MLP's rule.
    Raises ValueError where star is set and the block's number is unknown.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, star: bool = False):
        super().__init__(norm_layer)
        self.star = star

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        if self.star and site.located("norm.star").layer == 0:
            return Residual(f, pre=self.norm(site))
        return Residual(f) if site.kind == "attn" else NormFirst(f, self.norm(site))

    def inside(self, site: Site) -> nn.Module:
        return self.norm(site) if site.kind in ("q", "k", "v") else nn.Identity()

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)


class NormFirst(nn.Module):
    """u + f(u), u = N(h): the stream itself is normalized before the residual branches off."""

    def __init__(self, f: nn.Module, norm: nn.Module):
        super().__init__()
        self.norm, self.f = norm, f

    def forward(self, h: Tensor) -> Tensor:
        u = self.norm(h)
        return u + self.f(u)
