"""The radial part of an update, for weights that a normalization makes scale-invariant (Heo et al. 2021,
arXiv:2006.08217).

Behind a normalization the length of a row W_i of a weight, or of the whole weight, has no effect on the loss: the
gradient is orthogonal to it. Momentum still lets that length grow, which shrinks the effective learning rate. AdamP
and SGDP recognize such weights by the angle between W and g, and take the radial part out of the update u:

    c_i = |⟨W_i, g_i⟩| / (max(‖W_i‖, ε) · max(‖g_i‖, ε));  where max_i c_i < δ / √d:  u_i <- u_i - Ŵ_i ⟨Ŵ_i, u_i⟩,

Ŵ_i = W_i / (‖W_i‖ + ε), d the length of W_i. The rows W_i are first the rows of the weight (the filters of a
convolution); if one of them is too little orthogonal, the whole weight is taken for one row; if that is as well, u
stays as it is. Everything is decided on the device, by masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def traces(w: Tensor, g: Tensor, u: Tensor) -> Tensor:
    """What `decide` needs to know of matrices W, g, u: (rows, d), or of some of their rows: (4, rows)."""
    length = torch.linalg.vector_norm
    return torch.stack([length(w, dim=-1), length(g, dim=-1), torch.linalg.vecdot(w, g), torch.linalg.vecdot(w, u)])


def decide(
    params: Sequence[Tensor], found: Sequence[Sequence[Tensor]], *, delta: float, eps: float, ratio: float
) -> tuple[list[Tensor], list[Tensor]]:
    """For each weight, of which `found` holds the traces of its pieces, the projection and the factor of the decay.

    The projection q: (rows, 1) is such that u - q W is the projected update, 0 where no view fires. The factor ρ:
    (1, 1) is `ratio` where one does, else 1. Weights of one shape are decided together.
    """
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, p in enumerate(params):
        shapes.setdefault((p.shape[0], p.shape[1:].numel()), []).append(i)
    q, rho = list(params), list(params)
    for (rows, d), at in shapes.items():
        w, g, wg, wu = torch.stack([torch.cat(list(found[i]), dim=1) for i in at], dim=1)[..., None]  # (at, rows, 1)
        channel, of_rows = view(w, g, wg, wu, delta / math.sqrt(d), eps)
        w, g = (torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (w, g))
        layer, of_all = view(w, g, wg.sum(1, keepdim=True), wu.sum(1, keepdim=True), delta / math.sqrt(rows * d), eps)
        projections = torch.where(channel, of_rows, torch.where(layer, of_all, 0.0))
        factors = (channel | layer).to(w.dtype) * (ratio - 1) + 1
        for i, projection, factor in zip(at, projections.unbind(), factors.unbind(), strict=True):
            q[i], rho[i] = projection, factor
    return q, rho


def view(w: Tensor, g: Tensor, wg: Tensor, wu: Tensor, limit: float, eps: float) -> tuple[Tensor, Tensor]:
    """Whether each weight is orthogonal to its gradient in all rows: (weights, 1, 1), and what that would take out."""
    cosines = wg.abs() / (w.clamp(min=eps) * g.clamp(min=eps))
    return cosines.amax(1, keepdim=True) < limit, wu / (w + eps).square()
