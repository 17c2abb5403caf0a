"""What the hidden states of a network tell about its layers: how far each turns them, and how large they have grown.

Throughout, `hidden` is (L, B, T, C), the same stream at L places in the order of the network, such as the input of each
block and the output of the last; a function that compares none of them takes (…, B, T, C). Everything is computed in at
least float32 (fp16 ends at 65504, where a square of 256 already is).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def angular_distance(hidden: Tensor, n: int = 1, *, tokens: str = "all") -> Tensor:
    """d[l] = mean over tokens of angle(h_l, h_{l+n}) / pi, in [0, 1]: (L - n,).

    How little the blocks l … l+n-1 do: near 0 they can be left out (Gromov et al. 2024, arXiv:2403.17887). tokens:
    "all" of every sequence, or the "last" alone, as in the released code of the papers on depth. They take the arccos
    of a cosine that rounding may push above 1; here the angle comes from atan2 and is exact for small turns too. A
    vector of zeros has no direction, so is at a right angle to all, 0.5.
    """
    if tokens not in ("all", "last"):
        raise ValueError(f"tokens is all or last; got {tokens!r}")
    before, after = _pairs(hidden if tokens == "all" else hidden[:, :, -1:], n)
    return (angle(before, after) / math.pi).mean((-2, -1))


def block_influence(hidden: Tensor, n: int = 1) -> Tensor:
    """BI[l] = mean over tokens of 1 - cos(h_l, h_{l+n}): (L - n,) (ShortGPT, Men et al. 2024, arXiv:2403.03853).

    Near 0 for a block that could be left out. A vector of zeros has the cosine 0 with all.
    """
    before, after = _pairs(hidden, n)
    return (1 - (_unit(before) * _unit(after)).sum(-1)).mean((-2, -1))


def angular_distances(hidden: Tensor, *, tokens: str = "all") -> Tensor:
    """D[l, m] = mean over tokens of angle(h_l, h_m) / pi for all pairs of layers: (L, L), symmetric, float64.

    Row l, column l + n is angular_distance(hidden, n)[l], the matrix of Gromov et al. 2024; `tokens` as there. From
    one product of unit vectors per token, in float64 (float32 where the device has no other), where a cosine tells
    angles above 1e-8.
    """
    if tokens not in ("all", "last"):
        raise ValueError(f"tokens is all or last; got {tokens!r}")
    if hidden.dim() != 4:
        raise ValueError(f"hidden states are (L, B, T, C); got the shape {tuple(hidden.shape)}")
    units = _unit(hidden if tokens == "all" else hidden[:, :, -1:]).flatten(1, 2).transpose(0, 1)  # (tokens, L, C)
    units = units.to(torch.float32 if hidden.device.type == "mps" else torch.float64)
    units = torch.nn.functional.normalize(units, dim=-1)  # once more, as float32 leaves 1e-7 of the length
    found = (units @ units.mT).clamp(-1, 1).arccos().mean(0) / math.pi
    return found.fill_diagonal_(0)


def channel_variance(hidden: Tensor) -> Tensor:
    """mean over tokens of the variance over channels, (1/C) sum_c (h_c - mean_c h)², biased: (…).

    The output variance that Pre-LN lets grow with depth (inverse-depth scaling, LayerNorm scaling); its mean per
    token is taken out, so it is what a LayerNorm divides by.
    """
    return _wide(hidden).var(-1, correction=0).mean((-2, -1))


def total_variance(hidden: Tensor) -> Tensor:
    """The variance over samples, tokens and channels at once, biased: (…)."""
    return _wide(hidden).flatten(-3).var(-1, correction=0)


def mean_square(hidden: Tensor) -> Tensor:
    """mean over samples, tokens and channels of h²: (…); what an RMSNorm divides by, on average."""
    return _wide(hidden).square().mean((-3, -2, -1))


def top_abs(hidden: Tensor, k: int = 3) -> Tensor:
    """The k largest |h| over samples, tokens and channels, the largest first: (…, k) (Sun et al. 2024,
    arXiv:2402.17762, on massive activations)."""
    return _wide(hidden).flatten(-3).abs().topk(k, -1).values


def max_abs(hidden: Tensor) -> Tensor:
    """max |h| over samples, tokens and channels: (…). Above 65504 fp16 overflows."""
    return top_abs(hidden, 1)[..., 0]


def median_abs(hidden: Tensor) -> Tensor:
    """The median of |h| over samples, tokens and channels: (…); of an even number, the mean of the middle two."""
    values = _wide(hidden).flatten(-3).abs()
    count = values.shape[-1]
    low, high = (values.kthvalue(place, -1).values for place in ((count + 1) // 2, count // 2 + 1))
    return (low + high) / 2


def massive(hidden: Tensor, *, least: float = 100.0, ratio: float = 1000.0) -> Tensor:
    """How many activations are massive, |h| > least and |h| > ratio · median |h|: (…), int64.

    The usual criterion of Sun et al. 2024, arXiv:2402.17762.
    """
    threshold = (ratio * median_abs(hidden)).clamp(min=least)
    return (_wide(hidden).flatten(-3).abs() > threshold[..., None]).sum(-1)


def residual_sinks(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """mean |h| of each channel over layers, samples and tokens, the largest first, and the channels' numbers: (C,).

    A few channels that stand out at all layers are residual sinks (arXiv:2601.22966).
    """
    return _wide(hidden).flatten(0, -2).abs().mean(0).sort(descending=True)


def sink_share(magnitudes: Tensor, share: float = 0.01) -> Tensor:
    """How much of sum_c m_c the largest `share` of the channels hold, at least one channel: 0-d.

    magnitudes: (C,), mean |h| of each channel. About `share` where no channel stands out, near 1 where a few residual
    sinks carry the stream; 0 for zeros.
    """
    largest = magnitudes.topk(max(1, round(share * len(magnitudes)))).values.sum()
    return torch.where(magnitudes.sum() == 0, 0.0, largest / magnitudes.sum())


def angle(a: Tensor, b: Tensor) -> Tensor:
    """The angle between vectors along the last axis, 0 … pi: 2 atan2(|u - v|, |u + v|) of the unit vectors u and v.

    Equals arccos(u·v), without losing small angles to rounding (arccos in float32 knows none below 3e-4) and without
    NaN. Between a vector of zeros and any other: pi / 2.
    """
    u, v = _unit(a), _unit(b)
    found = 2 * torch.atan2(torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1))
    directed = (u != 0).any(-1) & (v != 0).any(-1)
    return torch.where(directed | u.isnan().any(-1) | v.isnan().any(-1), found, math.pi / 2)


def _pairs(hidden: Tensor, n: int) -> tuple[Tensor, Tensor]:
    if hidden.dim() != 4 or not 1 <= n < len(hidden):
        raise ValueError(
            f"layers n={n} apart need hidden states (L, B, T, C) with 1 <= n < L; got the shape {tuple(hidden.shape)}. "
            "Stack the input of each block and the output of the last"
        )
    return hidden[:-n], hidden[n:]


def _unit(x: Tensor) -> Tensor:
    """x / |x| along the last axis, zeros where |x| = 0; divided by max |x| first, so that squares neither over- nor
    underflow."""
    x = _wide(x)
    largest = x.abs().amax(-1, keepdim=True)
    x = torch.where(largest > 0, x / largest, 0.0 * x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(length > 0, x / length, x)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
