"""A transformer block: attention and MLP, each wrapped by the placement. It knows sites, never names."""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from trainkit.norm.placement import Placement, Site


class Block(nn.Module):
    """stream -> stream: mlp(attn(stream)), both residual. The two makers build a sublayer for the site they get."""

    def __init__(
        self,
        attn: Callable[[Site], nn.Module],
        mlp: Callable[[Site], nn.Module],
        norm: Placement,
        *,
        width: int,
        layer: int,
        depth: int,
    ):
        super().__init__()
        first = Site("attn", width, layer=layer, depth=depth, index=2 * layer, count=2 * depth)
        second = replace(first, kind="mlp", index=2 * layer + 1)
        self.attn = norm.around(attn(first), first)
        self.mlp = norm.around(mlp(second), second)

    def forward(self, stream: Tensor) -> Tensor:
        return self.mlp(self.attn(stream))
