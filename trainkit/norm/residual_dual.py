"""ResiDual (Xie et al. 2023, arXiv:2304.14802): a Post-LN stream and a Pre-LN stream side by side."""

from collections.abc import Callable

from torch import Tensor, nn

from trainkit.norm.placement import Placement, Site, times

Streams = tuple[Tensor, Tensor]  # (h, d): the normalized stream, which sublayers read, and the sum of their outputs


class ResidualDual(Placement):
    """h_0 = x, d_0 = s · x; u = f(h); d <- d + s · u; h <- N(h + u); y = a · h + N(d).

        h ──┬── f ──┬── + ── N ──►          the Post-LN stream, whose representation does not collapse
            └───────│───┘
        d ─────── · s + ─────────►          the Pre-LN stream, whose gradient does not vanish

    d adds up the unnormalized outputs; a small s (dual_scale) keeps it in the range of fp16, and the norm on it makes
    the output independent of s up to eps. a is output_scale. Between blocks flows the pair (h, d). The official code
    gives the last norm an eps of 1e-7; here it is norm_layer's own.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, dual_scale: float = 1.0, output_scale: float = 1.0):
        super().__init__(norm_layer)
        if not dual_scale > 0:
            raise ValueError(f"norm.dual_scale must be positive; got {dual_scale}. Try 1")
        self.dual_scale, self.output_scale = dual_scale, output_scale

    def before(self, site: Site) -> nn.Module:
        return Open(self.dual_scale)

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Dual(f, self.norm(site), self.dual_scale)

    def after(self, site: Site) -> nn.Module:
        return Close(self.norm(site), self.output_scale)


class Open(nn.Module):
    """x -> (x, s · x)."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Streams:
        return x, times(self.scale, x)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class Dual(nn.Module):
    """(h, d) -> (N(h + u), d + s · u), u = f(h)."""

    def __init__(self, f: nn.Module, post: nn.Module, scale: float):
        super().__init__()
        self.f, self.post, self.scale = f, post, scale

    def forward(self, streams: Streams) -> Streams:
        h, d = streams
        u = self.f(h)
        return self.post(h + u), d + times(self.scale, u)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class Close(nn.Module):
    """(h, d) -> a · h + N(d)."""

    def __init__(self, norm: nn.Module, scale: float):
        super().__init__()
        self.norm, self.scale = norm, scale

    def forward(self, streams: Streams) -> Tensor:
        h, d = streams
        return times(self.scale, h) + self.norm(d)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"
