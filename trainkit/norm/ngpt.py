"""nGPT (Loshchilov et al. 2024, arXiv:2410.01131): everything on the unit sphere, learned scales and no norm layers."""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm.placement import Placement, Site


class NGPT(Placement):
    """h <- unit(unit(h) + |a| (unit(f(h)) - unit(h))), a: (width,) learned, starts at `rate`; unit(z) = z / ‖z‖.

        h ── unit ──┬── f ── unit ──┬── h + |a| (u - h) ── unit ──►
                    └───────────────┘

    A step along the sphere from the stream towards the sublayer's output. Inside attention, after the rotation,
    q and k become s · unit(·) per head and the softmax's scale sqrt(head_dim); the input of the MLP's activation is
    multiplied by s · sqrt(width), the logits by s; all s start at 1 (in the sense of the factor they have).
    Parameters are stored as in the official code, at 1/sqrt(width) (MLP: 1) with the constant that makes up for it, as
    the stored size sets the speed at which Adam changes them. Weights stay unit through projection=unit, which the
    YAML brings along with an untied head and no weight decay. norm_layer is not used.
    Three differences: unit(0) is 0, not NaN; norms are computed in at least float32; and q carries s² while k stays
    unit, since only the product of q and k matters: the same numbers and gradients, also where heads share a key.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, rate: float = 0.05):
        super().__init__(norm_layer)
        if not rate > 0:
            raise ValueError(f"norm.rate is the first step towards a sublayer's output, above 0; got {rate}. Try 0.05")
        self.rate = rate

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Approach(f, site.width, rate=self.rate, axis=site.axis)

    def inside(self, site: Site) -> nn.Module:
        small = 1 / sqrt(site.stream)
        match site.kind:
            case "q_rotated":
                return UnitQuery(site.heads, site.width, start=small)
            case "k_rotated":
                return Unit()
            case "hidden":
                return Scale(site.width, start=1.0, constant=sqrt(site.stream), axis=site.axis)
            case "logits":
                return Scale(site.width, start=small, constant=1 / small, axis=site.axis)
        return nn.Identity()


class Approach(nn.Module):
    """h -> unit(h + |a| (u - h)) of unit h and u = f(h); a = rate · sqrt(width) · step, step from 1/sqrt(width)."""

    def __init__(self, f: nn.Module, width: int, *, rate: float = 0.05, axis: int = -1):
        super().__init__()
        self.f, self.rate, self.axis = f, rate, axis
        self.step = nn.Parameter(torch.full((width,), 1 / sqrt(width)))

    def forward(self, h: Tensor) -> Tensor:
        u, start = unit(self.f(h), self.axis), unit(h, self.axis)
        a = (self.step * (self.rate * sqrt(self.step.numel()))).abs()
        change = ((u - start).movedim(self.axis, -1) * a).movedim(-1, self.axis)
        return unit(start + change, self.axis).type_as(h)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class Unit(nn.Module):
    """x / ‖x‖ over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return unit(x).type_as(x)


class UnitQuery(nn.Module):
    """head_dim · s² · q / ‖q‖ of q: (B, heads, T, head_dim), s: one per channel of every head, 1 at the start.

    Attention divides by sqrt(head_dim); the factor head_dim turns that into nGPT's multiplication by it.
    """

    def __init__(self, heads: int, head_dim: int, *, start: float):
        super().__init__()
        self.heads, self.head_dim, self.constant = heads, head_dim, 1 / start
        self.scale = nn.Parameter(torch.full((heads * head_dim,), start))

    def forward(self, q: Tensor) -> Tensor:
        s = (self.scale * self.constant).view(self.heads, 1, self.head_dim)
        return (unit(q) * (self.head_dim * s.square())).type_as(q)


class Scale(nn.Module):
    """constant · scale · x, scale: (width,)."""

    def __init__(self, width: int, *, start: float, constant: float, axis: int = -1):
        super().__init__()
        self.constant, self.axis = constant, axis
        self.scale = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return (x.movedim(self.axis, -1) * (self.scale * self.constant)).movedim(-1, self.axis).type_as(x)

    def extra_repr(self) -> str:
        return f"constant={self.constant:g}"


def unit(x: Tensor, axis: int = -1) -> Tensor:
    """x / ‖x‖ over `axis` in at least float32; zero stays zero."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=axis)
