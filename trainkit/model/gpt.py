"""GPT-2 (Radford et al. 2019): a decoder-only transformer with learned positions; mathematics as in nanoGPT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.model.parts.attention import Attention, width_per_head
from trainkit.model.parts.decoder import Decoder, output_std
from trainkit.model.parts.mlp import MLP
from trainkit.norm.placement import Placement, Site


class GPT(Decoder):
    """tokens (B, T) -> logits (B, T, vocab).

    x = dropout(embed(token) + position); blocks of attention and GELU MLP (`hidden` units, 4 x width unless told), each
    sublayer wrapped by the placement `norm`; logits = head(after(x)). `tie` shares the head's weights with the
    embedding. Weights are N(0, 0.02²); init="gpt2" divides the standard deviation of the output projections by
    sqrt(2 depth), init="plain" does not (LayerNorm Scaling requires that). OpenAI's weights have bias=True and
    gelu="tanh"; the defaults are nanoGPT's.
    """

    def __init__(
        self,
        vocab: int,
        norm: Placement,
        *,
        depth: int = 6,
        width: int = 64,
        hidden: int | None = None,
        heads: int = 4,
        context: int = 128,
        dropout: float = 0.0,
        bias: bool = False,
        gelu: str = "exact",
        qk_norm: str = "none",
        tie: bool = True,
        init: str = "gpt2",
        first_layer: str = "plain",
        tract_lambda: float = 0.1,
    ):
        width_per_head(width, heads)
        linears = {"bias": bias, "dropout": dropout, "out_std": output_std(init, depth)}

        def attn(site: Site) -> nn.Module:
            return Attention(site, norm, heads=heads, qk_norm=qk_norm, **linears)

        def mlp(site: Site) -> nn.Module:
            return MLP(site, norm, hidden=4 * width if hidden is None else hidden, gelu=gelu, **linears)

        first = {"first_layer": first_layer, "tract_lambda": tract_lambda}
        super().__init__(vocab, norm, attn, mlp, depth=depth, width=width, context=context, tie=tie, **first)
        self.dropout = dropout
        self.position = nn.Embedding(context, width)
        nn.init.normal_(self.position.weight, std=0.02)

    def features(self, tokens: Tensor, start: int = 0) -> Tensor:
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.position(positions)
        return F.dropout(x, self.dropout, self.training)
