"""Normalization of queries and keys inside an attention layer, before any rotation."""

from collections.abc import Callable

from torch import Tensor, nn

MODES = ("none", "head", "full")


def qk_norm(norm_layer: Callable[..., nn.Module], mode: str, *, heads: int, head_dim: int) -> nn.Module:
    """A norm for the queries, or for the keys, of all heads: (…, heads, T, head_dim) -> same.

    "head": over the head_dim channels of each head, with one gain of length head_dim for all of them (Qwen 3, Gemma 3,
    HybridNorm). "full": over the heads · head_dim channels of the whole projection, as if before the head split
    (OLMo 2, arXiv:2501.00656); the statistic mixes heads. "none": the identity. Scores stay divided by
    sqrt(head_dim). Keys have their own norm, with the number of key heads. Raises ValueError on another mode.
    """
    if mode not in MODES:
        raise ValueError(f"model.qk_norm is one of {', '.join(MODES)}; got {mode!r}")
    if mode == "none":
        return nn.Identity()
    return norm_layer(head_dim) if mode == "head" else AcrossHeads(norm_layer(heads * head_dim))


class AcrossHeads(nn.Module):
    """norm over heads and channels together; x: (…, heads, T, head_dim) -> same."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        heads, head_dim = x.shape[-3], x.shape[-1]
        joined = x.transpose(-3, -2).flatten(-2)  # (…, T, heads · head_dim)
        return self.norm(joined).unflatten(-1, (heads, head_dim)).transpose(-3, -2)
