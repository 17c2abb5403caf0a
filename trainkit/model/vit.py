"""Vision Transformer (Dosovitskiy et al. 2021, arXiv:2010.11929) with the sizes of DeiT (Touvron et al. 2021)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.model.parts.attention import Attention, width_per_head
from trainkit.model.parts.block import Block
from trainkit.model.parts.decoder import output_std
from trainkit.model.parts.mlp import MLP
from trainkit.model.parts.tract import first_layer as build_first_layer
from trainkit.norm.placement import Placement, Site


class ViT(nn.Module):
    """images (B, C, H, W) -> logits (B, classes).

    Patches of `patch` x `patch` pixels become tokens by one linear map; a class token is put before them and learned
    positions are added; blocks of bidirectional attention and GELU MLP (`hidden` units, 4 x width unless told), each
    sublayer wrapped by the placement `norm`; logits = head(after(x)) of the class token. `image` is (channels, height,
    width). first_layer="tract" gives the map of the patches the weight gradient of TrAct (parts/tract.py).
    """

    def __init__(
        self,
        image: Sequence[int],
        classes: int,
        norm: Placement,
        *,
        patch: int = 4,
        depth: int = 12,
        width: int = 192,
        hidden: int | None = None,
        heads: int = 3,
        dropout: float = 0.0,
        bias: bool = True,
        qk_norm: str = "none",
        init: str = "plain",
        first_layer: str = "plain",
        tract_lambda: float = 0.1,
    ):
        super().__init__()
        channels, height, across = image
        if height % patch or across % patch:
            raise ValueError(f"model.patch must divide the image; {patch} does not divide {height} x {across}")
        for key, value in (("depth", depth), ("width", width), ("classes", classes)):
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1; got {value}")
        width_per_head(width, heads)
        self.patch, self.dropout = patch, dropout
        tokens = 1 + (height // patch) * (across // patch)
        std = 0.02
        self.embed = build_first_layer(nn.Linear, first_layer, tract_lambda)(channels * patch * patch, width)
        self.embed.role = "embed"  # type: ignore[assignment]
        self.class_token = nn.Parameter(std * torch.randn(1, 1, width))
        self.position = nn.Embedding(tokens, width)
        self.before = norm.before(Site("embed", width, depth=depth, count=2 * depth))
        linears = {"bias": bias, "dropout": dropout, "out_std": output_std(init, depth)}

        def attn(site: Site) -> nn.Module:
            return Attention(site, norm, heads=heads, causal=False, qk_norm=qk_norm, **linears)

        def mlp(site: Site) -> nn.Module:
            return MLP(site, norm, hidden=4 * width if hidden is None else hidden, **linears)

        self.blocks = nn.ModuleList(Block(attn, mlp, norm, width=width, layer=l, depth=depth) for l in range(depth))
        self.after = norm.after(Site("head", width, layer=depth - 1, depth=depth, index=2 * depth - 1, count=2 * depth))
        self.head = nn.Linear(width, classes)
        self.head.role = "head"  # type: ignore[assignment]
        for layer in (self.embed, self.head):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.position.weight, std=std)
        self.logit_norm = norm.inside(Site("logits", classes, stream=width))

    def patches(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, tokens, C · patch²), row by row."""
        return F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(self.patches(images))
        x = torch.cat((self.class_token.expand(x.shape[0], -1, -1), x), dim=1) + self.position.weight
        stream = self.before(F.dropout(x, self.dropout, self.training))
        for block in self.blocks:
            stream = block(stream)
        return self.logit_norm(self.head(self.after(stream)[:, 0]))
