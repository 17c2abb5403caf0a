"""Multi-head softmax attention, the sublayer that every transformer here shares."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.model.parts.cache import Cache
from trainkit.model.parts.linear import linear
from trainkit.norm.placement import Placement, Site
from trainkit.norm_layer.qk import qk_norm as norm_per_head


class Attention(nn.Module):
    """out(softmax(q kᵀ / sqrt(head_dim)) v), per head; q, k, v = split(qkv(x)); x: (B, T, width) -> same.

    kv_heads below heads shares each key and value among heads / kv_heads queries (grouped queries).
    rotation: (B, heads, T, head_dim) -> same, applied to q and k. The placement may put norms on q, k and v
    (sites "q", "k", "v" before the rotation, "q_rotated", "k_rotated" after it, each per head); under any other one
    qk_norm puts its norm layer on queries and keys: "head", "full", or "none". With a `cache` attached, x are the
    tokens after those that it holds; a rotation then also takes the position of the first, `start`.
    """

    cache: Cache | None = None

    def __init__(
        self,
        site: Site,
        norm: Placement,
        *,
        heads: int,
        kv_heads: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        causal: bool = True,
        rotation: Callable[..., Tensor] | None = None,
        qk_norm: str = "none",
        std: float = 0.02,
        out_std: float = 0.02,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width_per_head(site.width, heads, kv_heads)
        self.dropout, self.causal, self.rotation = dropout, causal, rotation
        self.qkv = linear(site.width, (heads + 2 * kv_heads) * self.head_dim, bias=bias, std=std)
        self.out = linear(site.width, site.width, bias=bias, std=out_std, writes_stream=True)

        def inside(kind: str, count: int) -> nn.Module:
            return norm.inside(replace(site, kind=kind, width=self.head_dim, heads=count))

        def query_or_key(kind: str, count: int) -> nn.Module:
            own = inside(kind, count)
            if qk_norm == "none":
                return own
            if not isinstance(own, nn.Identity):
                raise ValueError(
                    f"the placement normalizes queries and keys itself; model.qk_norm={qk_norm} must be none"
                )
            return norm_per_head(norm.norm_layer, qk_norm, heads=count, head_dim=self.head_dim)

        self.q_norm, self.k_norm = query_or_key("q", heads), query_or_key("k", kv_heads)
        self.v_norm = inside("v", kv_heads)
        self.q_rotated, self.k_rotated = inside("q_rotated", heads), inside("k_rotated", kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        # (B, T, (heads + 2 kv_heads) head_dim) -> three of (B, ·heads, T, head_dim)
        qkv = self.qkv(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k, v = self.q_norm(q), self.k_norm(k), self.v_norm(v)
        if self.rotation is not None:
            at = {} if self.cache is None else {"start": self.cache.length}
            q, k = self.rotation(q, **at), self.rotation(k, **at)
        q, k = self.q_rotated(q), self.k_rotated(k)
        if self.cache is not None:
            k, v = self.cache.extend(self, k, v)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self.visible(q, k),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and q.shape[2] == k.shape[2],
            enable_gqa=self.kv_heads < self.heads,
        )
        y = self.out(y.transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training)

    def visible(self, q: Tensor, k: Tensor) -> Tensor | None:
        """Which keys each query may see, (queries, keys), where the queries are the last of more tokens; else None."""
        new, total = q.shape[2], k.shape[2]
        if new == total or new == 1:
            return None
        return torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)

    @torch.no_grad()
    def scale_branch(self, *, first: float, last: float) -> None:
        """Multiplies the value projection by `first` and the output projection by `last`, in place."""
        self.qkv.weight[-self.kv_heads * self.head_dim :] *= first
        self.out.weight *= last


def width_per_head(width: int, heads: int, kv_heads: int | None = None) -> int:
    """width / heads. Raises ValueError where heads cannot share the width, or queries the keys.

    Models call it with their own arguments, so that the mistake shows before anything is built.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"model.heads and model.kv_heads must be at least 1; got {heads} and {kv_heads}")
    if width % heads:
        raise ValueError(
            f"model.width must be a multiple of model.heads; {width} is no multiple of {heads}. "
            f"Try model.width={width // heads * heads or heads}"
        )
    if heads % kv_heads:
        raise ValueError(f"model.heads must be a multiple of model.kv_heads; got {heads} and {kv_heads}")
    return width // heads
