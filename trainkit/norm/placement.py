"""The interface of norm placements: a value that answers at four sites of a network.

A model asks its placement for four things and never knows its name: `before` turns features into whatever flows
between blocks (the stream), `around` wraps one residual sublayer, `inside` sits within a sublayer, and `after`
turns the stream back into features. `print(model)` then shows the placement in full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """A spot in a network where a norm may sit.

    kind: "embed" and "head" (the two ends), "attn", "mlp", "conv" (sublayers), and inside a sublayer "q", "k", "v"
    (per head, before any rotation), "q_rotated", "k_rotated" (per head, after it), "hidden" (the activation's
    input), "last" (the input of an MLP's last layer), "logits". width: channels there, on `axis`. layer: 0-based block
    of `depth`. index: 0-based sublayer of `count` in the whole network; depth and count are 0 where nobody told.
    heads: how many heads share the spot (1 where there are none). stream: channels of the residual stream (`width`
    unless told), for the spots whose own width differs.
    """

    kind: str
    width: int
    layer: int = 0
    depth: int = 0
    axis: int = -1
    index: int = 0
    count: int = 0
    heads: int = 1
    stream: int = 0

    def __post_init__(self) -> None:
        for name, number, of, total in (
            ("layer", self.layer, "depth", self.depth),
            ("index", self.index, "count", self.count),
        ):
            if not 0 <= number < (total or 1):
                raise ValueError(
                    f"Site.{name} counts from 0 and stays below Site.{of}; got {number} of {total} at {self.kind!r}"
                )
        if self.stream == 0:
            object.__setattr__(self, "stream", self.width)

    def located(self, option: str) -> Site:
        """This site, once it is sure that the model told its layer, depth, index and count. `option` asks."""
        if self.depth == 0 or self.count == 0:
            raise ValueError(
                f"{option} depends on which sublayer of how many it wraps, but the model's site {self.kind!r} has "
                f"depth {self.depth} and count {self.count}. Pass layer, depth, index and count to Site; try norm=pre"
            )
        return self


class Placement:
    """Where normalization sits. A leaf overrides `around`, and the other three where it differs from "nothing"."""

    def __init__(self, norm_layer: Callable[..., nn.Module]):
        self.norm_layer = norm_layer

    def norm(self, site: Site) -> nn.Module:
        """A new norm layer for the channels at `site`."""
        return self.norm_layer(site.width, axis=site.axis)

    def before(self, site: Site) -> nn.Module:
        """features -> stream, once, after the embedding."""
        return nn.Identity()

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        """stream -> stream; owns the residual connection around the sublayer `f`."""
        raise NotImplementedError

    def inside(self, site: Site) -> nn.Module:
        """A tensor within a sublayer -> the same shape."""
        return nn.Identity()

    def after(self, site: Site) -> nn.Module:
        """stream -> features, once, before the head."""
        return nn.Identity()


class Residual(nn.Module):
    """h <- post(skip · h + scale · out(f(pre(h)))): the shape that most placements share.

    pre, out, post: norms (or None) on the sublayer's input, its output and the sum; skip and scale: constants or
    scalar parameters. The sublayer is called `f`, so weights keep the names `blocks.3.attn.f.…` under every placement.
    """

    def __init__(
        self,
        f: nn.Module,
        *,
        pre: nn.Module | None = None,
        out: nn.Module | None = None,
        post: nn.Module | None = None,
        skip: float | nn.Parameter = 1.0,
        scale: float | nn.Parameter = 1.0,
    ):
        super().__init__()
        self.pre, self.f, self.out, self.post = pre, f, out, post
        self.skip, self.scale = skip, scale

    def forward(self, h: Tensor) -> Tensor:
        u = self.f(h if self.pre is None else self.pre(h))
        if self.out is not None:
            u = self.out(u)
        h = times(self.skip, h) + times(self.scale, u)
        return h if self.post is None else self.post(h)

    def extra_repr(self) -> str:
        factors = {"skip": self.skip, "scale": self.scale}
        words = {k: f"{v:g}" if isinstance(v, (int, float)) else "learned" for k, v in factors.items()}
        return ", ".join(f"{k}={word}" for k, word in words.items() if word != "1")


def times(factor: float | Tensor, x: Tensor) -> Tensor:
    """factor · x, without the multiplication where the factor is the constant one."""
    return x if isinstance(factor, (int, float)) and factor == 1 else factor * x


def scale_branch(f: nn.Module, option: str, *, first: float, last: float) -> None:
    """Multiplies a sublayer's value or input weights by `first`, its output weights by `last`; `option` asks for it."""
    if not hasattr(f, "scale_branch"):
        raise ValueError(
            f"{option} rescales the initial weights of every sublayer, but {type(f).__name__} has no method "
            "scale_branch(first=, last=). Give it one, or try norm=pre"
        )
    f.scale_branch(first=first, last=last)  # type: ignore[operator]
