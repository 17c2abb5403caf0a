"""What decoder-only language models share: embedding, blocks under a placement, head."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor, nn

from trainkit.model.parts.block import Block
from trainkit.model.parts.cache import Cache
from trainkit.model.parts.token_loss import large, loss_by_pieces, token_loss
from trainkit.model.parts.tract import first_layer as build_first_layer
from trainkit.norm.placement import Placement, Site


class Decoder(nn.Module):
    """tokens (B, T) -> logits (B, T, vocab): head(after(blocks(before(features(tokens))))).

    With `targets` (B, T) it gives their mean cross-entropy instead, 0-d (parts/token_loss.py).
    attn and mlp build a sublayer for the site they get. `tie` shares the head's weights with the embedding;
    first_layer="tract" gives the embedding the weight gradient of TrAct (parts/tract.py).
    A leaf may override `features`, embed(tokens) here, to add positions. With a `cache` attached, the tokens are those
    after the ones that it holds.
    """

    cache: Cache | None = None
    gives_loss = True  # forward takes targets

    def __init__(
        self,
        vocab: int,
        norm: Placement,
        attn: Callable[[Site], nn.Module],
        mlp: Callable[[Site], nn.Module],
        *,
        depth: int,
        width: int,
        context: int,
        tie: bool,
        std: float = 0.02,  # of the embedding
        first_layer: str = "plain",
        tract_lambda: float = 0.1,
    ):
        super().__init__()
        for key, value in (("vocab", vocab), ("depth", depth), ("width", width), ("context", context)):
            if value < 1:
                raise ValueError(f"model.{key} must be at least 1; got {value}")
        self.depth, self.width, self.context = depth, width, context
        self.embed = build_first_layer(nn.Embedding, first_layer, tract_lambda)(vocab, width)
        nn.init.normal_(self.embed.weight, std=std)
        self.before = norm.before(Site("embed", width, depth=depth, count=2 * depth))
        self.blocks = nn.ModuleList(Block(attn, mlp, norm, width=width, layer=l, depth=depth) for l in range(depth))
        self.after = norm.after(Site("head", width, layer=depth - 1, depth=depth, index=2 * depth - 1, count=2 * depth))
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.role = "head"  # type: ignore[assignment]
        nn.init.normal_(self.head.weight, std=0.02)
        if tie:
            self.head.weight = self.embed.weight
        self.logit_norm = norm.inside(Site("logits", vocab, stream=width))

    def features(self, tokens: Tensor, start: int = 0) -> Tensor:
        """(B, T), at the positions from `start` -> (B, T, width)."""
        return self.embed(tokens)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        start = 0 if self.cache is None else self.cache.length
        length = start + tokens.shape[1]
        if length > self.context:
            raise ValueError(
                f"the model reads at most {self.context} tokens at once; got {length}. Try model.context={length}"
            )
        stream = self.before(self.features(tokens, start))
        for block in self.blocks:
            stream = block(stream)
        if self.cache is not None:
            self.cache.advance(tokens.shape[1])
        features = self.after(stream)
        if targets is not None and self._by_pieces(features):
            return loss_by_pieces(features, self.head.weight, targets)
        logits = self.logit_norm(self.head(features))
        return logits if targets is None else token_loss(logits, targets)

    def _by_pieces(self, features: Tensor) -> bool:
        """Whether the logits are too many to be held at once, and nobody looks at them on their way to the loss."""
        hooks = self.head._forward_hooks or self.head._forward_pre_hooks or self.head._backward_hooks
        seen = hooks or type(self.head) is not nn.Linear or not isinstance(self.logit_norm, nn.Identity)
        transformed = torch._C._are_functorch_transforms_active()  # which differentiate by their own rules
        rows = features.numel() // self.width
        return not (seen or transformed) and large(rows, self.head.out_features, features)

    def flops_per_token(self, length: int) -> int:
        """Multiplications and additions per token of one forward and backward pass at a context of `length`.

        6 per weight that multiplies (head included, lookups not) plus 12 · depth · width · length for the two
        attention products (Chowdhery et al. 2022, arXiv:2204.02311, appendix B; the causal half is not subtracted).
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.depth * self.width * length


def output_std(init: str, depth: int, std: float = 0.02) -> float:
    """The standard deviation of output projections: std / sqrt(2 depth) for init="gpt2", std for init="plain"."""
    if init not in ("gpt2", "plain"):
        raise ValueError(f"model.init is gpt2 or plain; got {init!r}")
    return std / sqrt(2 * max(1, depth)) if init == "gpt2" else std
