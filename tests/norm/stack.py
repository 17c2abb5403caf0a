"""What the tests of placements share: one from the menu, transformer blocks around it, and toy sublayers."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from trainkit.model.parts.attention import Attention
from trainkit.model.parts.block import Block
from trainkit.model.parts.mlp import MLP
from trainkit.norm.placement import Placement, Site

CONF = Path(__file__).parents[2] / "conf"
PLACEMENTS = sorted(path.stem for path in (CONF / "norm").glob("*.yaml"))
WIDTH, HEADS = 12, 3


def menu(name: str, **settings: Any) -> Placement:
    """The placement of conf/norm/<name>.yaml with RMSNorm and changed settings."""
    root = {"norm_layer": settings_of("norm_layer", "rms"), "norm": {**settings_of("norm", name), **settings}}
    return instantiate(OmegaConf.create(root)).norm


@cache
def settings_of(group: str, name: str) -> dict[str, Any]:
    path = CONF / group / f"{name}.yaml"
    loaded: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return loaded[group] if "# @package _global_" in path.read_text() else loaded


class Toy(nn.Module):
    """last(tanh(first(h))) over the channels on `axis`, with the scale_branch that models offer."""

    def __init__(self, width: int, axis: int = -1):
        super().__init__()
        self.axis = axis
        self.first, self.last = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(h.movedim(self.axis, -1)))).movedim(-1, self.axis)

    @torch.no_grad()
    def scale_branch(self, *, first: float, last: float) -> None:
        self.first.weight *= first
        self.last.weight *= last


class Stack(nn.Module):
    """before, sublayers, after. make: builds sublayer number i."""

    def __init__(
        self,
        placement: Placement,
        make: Callable[[int], nn.Module],
        *,
        depth: int = 3,
        width: int = WIDTH,
        axis: int = -1,
    ):
        super().__init__()
        count = 2 * depth
        self.before = placement.before(Site("embed", WIDTH, depth=depth, count=count, axis=axis))
        self.sublayers = nn.Sequential(
            *(
                placement.around(
                    make(i),
                    Site(("attn", "mlp")[i % 2], WIDTH, layer=i // 2, depth=depth, index=i, count=count, axis=axis),
                )
                for i in range(count)
            )
        )
        self.after = placement.after(Site("head", WIDTH, depth=depth, count=count, axis=axis))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.sublayers(self.before(x)))


def toys(placement: Placement, *, depth: int = 3, axis: int = -1) -> Stack:
    return Stack(placement, lambda i: Toy(WIDTH, axis), depth=depth, axis=axis)


class Blocks(nn.Module):
    """The transformer of the models between embedding and head, causal, without dropout."""

    def __init__(
        self, placement: Placement, *, depth: int = 2, kv_heads: int = HEADS, rotation: Callable | None = None
    ):
        super().__init__()

        def attn(site: Site) -> nn.Module:
            return Attention(site, placement, heads=HEADS, kv_heads=kv_heads, rotation=rotation, std=0.3, out_std=0.3)

        def mlp(site: Site) -> nn.Module:
            return MLP(site, placement, hidden=3 * WIDTH, std=0.3, out_std=0.3)

        self.before = placement.before(Site("embed", WIDTH, depth=depth, count=2 * depth))
        self.blocks = nn.Sequential(
            *(Block(attn, mlp, placement, width=WIDTH, layer=l, depth=depth) for l in range(depth))
        )
        self.after = placement.after(Site("head", WIDTH, depth=depth, count=2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.blocks(self.before(x)))


def scatter(module: nn.Module, seed: int = 1) -> nn.Module:
    """Every parameter moved away from its first value, so that no factor hides by being one or zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention of (B, heads, T, head_dim), written out."""
    scores = scale * torch.einsum("bhid,bhjd->bhij", q, k)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bhjd->bhid", scores.masked_fill(future, float("-inf")).softmax(-1), v)


def split_heads(x: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """(B, T, sum(counts) · head_dim) -> one (B, count, T, head_dim) per count."""
    heads = x.unflatten(-1, (sum(counts), -1)).movedim(2, 1)
    return heads.split(list(counts), dim=1)


def rms(x: Tensor, gain: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    """Root-mean-square normalization over the last axis, written out."""
    return gain * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
