"""A residual multi-layer perceptron: the smallest network that every placement and norm layer fits."""

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

from trainkit.model.parts.decoder import output_std
from trainkit.model.parts.linear import linear
from trainkit.model.parts.mlp import MLP as Sublayer
from trainkit.model.parts.tract import first_layer as build_first_layer
from trainkit.norm.placement import Placement, Site


class Layer(nn.Module):
    """One residual sublayer, so that blocks are named as in the transformers: blocks.3.mlp.f.…"""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, stream: Tensor) -> Tensor:
        return self.mlp(stream)


class ResidualMLP(nn.Module):
    """images (B, C, H, W) -> logits (B, classes): head(after(blocks(before(embed(flattened images))))).

    Each block is one GELU sublayer of `hidden` units wrapped by the placement `norm`. first_layer="tract" gives `embed`
    the weight gradient of TrAct (parts/tract.py).
    """

    def __init__(
        self,
        image: Sequence[int],
        classes: int,
        norm: Placement,
        *,
        depth: int = 4,
        width: int = 128,
        hidden: int = 256,
        dropout: float = 0.0,
        bias: bool = True,
        init: str = "plain",
        first_layer: str = "plain",
        tract_lambda: float = 0.1,
    ):
        super().__init__()
        for key, value in (("depth", depth), ("width", width), ("hidden", hidden), ("classes", classes)):
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1; got {value}")
        std, out_std = prod(image) ** -0.5, output_std(init, depth, width**-0.5)
        self.embed = build_first_layer(nn.Linear, first_layer, tract_lambda)(prod(image), width)
        nn.init.normal_(self.embed.weight, std=std)
        nn.init.zeros_(self.embed.bias)
        self.embed.role = "embed"  # type: ignore[assignment]
        self.before = norm.before(Site("embed", width, depth=depth, count=depth))

        def block(layer: int) -> Layer:
            site = Site("mlp", width, layer=layer, depth=depth, index=layer, count=depth)
            options = {"hidden": hidden, "bias": bias, "dropout": dropout}
            return Layer(norm.around(Sublayer(site, norm, std=width**-0.5, out_std=out_std, **options), site))

        self.blocks = nn.ModuleList(block(layer) for layer in range(depth))
        self.after = norm.after(Site("head", width, layer=depth - 1, depth=depth, index=depth - 1, count=depth))
        self.head = linear(width, classes, bias=True, std=width**-0.5)
        self.head.role = "head"  # type: ignore[assignment]
        self.logit_norm = norm.inside(Site("logits", classes, stream=width))

    def forward(self, images: Tensor) -> Tensor:
        stream = self.before(self.embed(images.flatten(1)))
        for block in self.blocks:
            stream = block(stream)
        return self.logit_norm(self.head(self.after(stream)))
