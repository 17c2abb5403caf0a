"""LLaMA (Touvron et al. 2023, arXiv:2302.13971): rotary positions, SwiGLU, grouped queries, no bias."""

from torch import nn

from trainkit.model.parts.attention import Attention, width_per_head
from trainkit.model.parts.decoder import Decoder, output_std
from trainkit.model.parts.mlp import SwiGLU
from trainkit.model.parts.rotary import Rotary
from trainkit.norm.placement import Placement, Site


class Llama(Decoder):
    """tokens (B, T) -> logits (B, T, vocab).

    Blocks of rotary attention and SwiGLU, each sublayer wrapped by the placement `norm`. kv_heads below heads shares
    keys and values among queries. Linear weights are N(0, 0.02²) (init="plain", as in the Mix-LN and LNS papers;
    "gpt2" divides the output projections' by sqrt(2 depth)), embedding weights N(0, embed_std²): 0.02 in the LNS
    code, 0.632 in Mix-LN's.
    """

    def __init__(
        self,
        vocab: int,
        norm: Placement,
        *,
        depth: int = 8,
        width: int = 512,
        hidden: int = 1376,
        heads: int = 8,
        kv_heads: int | None = None,
        context: int = 256,
        dropout: float = 0.0,
        rope_base: float = 10000.0,
        qk_norm: str = "none",
        tie: bool = False,
        init: str = "plain",
        embed_std: float = 0.02,
        first_layer: str = "plain",
        tract_lambda: float = 0.1,
    ):
        linears = {"dropout": dropout, "out_std": output_std(init, depth)}
        rotation = Rotary(width_per_head(width, heads, kv_heads), context, base=rope_base)

        def attn(site: Site) -> nn.Module:
            return Attention(site, norm, heads=heads, kv_heads=kv_heads, rotation=rotation, qk_norm=qk_norm, **linears)

        def mlp(site: Site) -> nn.Module:
            return SwiGLU(site, norm, hidden=hidden, **linears)

        first = {"std": embed_std, "first_layer": first_layer, "tract_lambda": tract_lambda}
        super().__init__(vocab, norm, attn, mlp, depth=depth, width=width, context=context, tie=tie, **first)
