"""The radial part of an update, for weights that a normalization makes scale-invariant (Heo et al. 2021,
arXiv:2006.08217).

Behind a normalization the length of a row W_i of a weight, or of the whole weight, has no effect on the loss: the
gradient is orthogonal to it. Momentum still lets that length grow, which shrinks the effective learning rate. AdamP
and SGDP recognize such weights by the angle between W and g, and take the radial part out of the update u:

    c_i = |⟨W_i, g_i⟩| / (max(‖W_i‖, ε) · max(‖g_i‖, ε));  where max_i c_i < δ / √d:  u_i <- u_i - Ŵ_i ⟨Ŵ_i, u_i⟩,

Ŵ_i = W_i / (‖W_i‖ + ε), d the length of W_i. The rows W_i are first the rows of the weight (the filters of a
convolution); if one of them is too little orthogonal, the whole weight is taken for one row; if that is as well, u
stays as it is. Everything is decided on the device, by masks. A CPU has nothing to wait for: there the weights whose u
stays as it is are told from the others at once, and stepped without u being kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, Tensors, run
from trainkit.optimizer.orthogonal import by_shape


@dataclass
class View:
    """A weight and its gradient, seen as rows and as a whole.

    lengths: ‖W_i‖, (rows, 1); by_row, whole: whether they are orthogonal in all rows, and as one row, (1, 1).
    """

    lengths: Tensor
    by_row: Tensor
    whole: Tensor


def views(bucket: Bucket, *, delta: float, eps: float, compile: bool = False) -> list[View]:
    """Of each weight of a bucket. Weights of one shape are looked at together."""
    found = run(traces, bucket.params, bucket.gradients, rows=True, compile=compile)
    seen: dict[int, View] = {}
    for at in by_shape(bucket.params):
        w, g, wg = torch.stack([torch.cat(found[i], dim=1) for i in at], dim=1)[..., None]  # (at, rows, 1)
        rows, d = w.shape[1], bucket.params[at[0]].shape[1:].numel()
        by_row = cosines(w, g, wg, eps).amax(1, keepdim=True) < delta / math.sqrt(d)
        w1, g1, wg1 = length(w), length(g), wg.sum(1, keepdim=True)
        whole = cosines(w1, g1, wg1, eps) < delta / math.sqrt(rows * d)
        seen.update((i, View(*view)) for i, *view in zip(at, w, by_row, whole, strict=True))
    return [seen[i] for i in range(len(found))]


def divide(seen: Sequence[View]) -> tuple[list[int], list[int]]:
    """The weights whose updates may lose a radial part, all of them on an accelerator, and those whose do not."""
    fires = [True] * len(seen)
    if seen[0].whole.is_cpu:
        fires = torch.cat([view.by_row | view.whole for view in seen]).flatten().tolist()
    return [i for i, one in enumerate(fires) if one], [i for i, one in enumerate(fires) if not one]


def projections(
    seen: Sequence[View], found: Sequence[Sequence[Tensor]], *, eps: float, ratio: float
) -> tuple[list[Tensor], list[Tensor]]:
    """For each weight, of which `found` holds ⟨W_i, u_i⟩ piece by piece, the projection and the factor of the decay.

    The projection q: (rows, 1) is such that u - q W is the projected update, 0 where no view fires. The factor ρ:
    (1, 1) is `ratio` where one does, else 1. Weights with equally many rows are worked on together.
    """
    q: dict[int, Tensor] = {}
    rho: dict[int, Tensor] = {}
    for at in by_shape([view.lengths for view in seen]):
        lengths, by_row, whole = (torch.stack([getattr(seen[i], name) for i in at]) for name in View.__annotations__)
        wu = torch.stack([torch.cat(list(found[i])) for i in at])[..., None]  # (at, rows, 1)
        of_rows = wu / (lengths + eps).square()
        of_all = wu.sum(1, keepdim=True) / (length(lengths) + eps).square()
        projection = torch.where(by_row, of_rows, torch.where(whole, of_all, 0.0))
        q.update(zip(at, projection, strict=True))
        rho.update(zip(at, (by_row | whole).to(wu.dtype) * (ratio - 1) + 1, strict=True))
    return [q[i] for i in range(len(seen))], [rho[i] for i in range(len(seen))]


def traces(w: Tensors, g: Tensors) -> list[Tensor]:
    """‖W_i‖, ‖g_i‖ and ⟨W_i, g_i⟩ of matrices (rows, d), or of some of their rows: (3, rows) each."""
    norm, dot = torch.linalg.vector_norm, torch.linalg.vecdot
    return [torch.stack([norm(a, dim=-1), norm(b, dim=-1), dot(a, b)]) for a, b in zip(w, g, strict=True)]


def dots(w: Tensors, u: Tensors) -> list[Tensor]:
    """⟨W_i, u_i⟩: (rows,) each."""
    return [torch.linalg.vecdot(a, b) for a, b in zip(w, u, strict=True)]


def cosines(w: Tensor, g: Tensor, wg: Tensor, eps: float) -> Tensor:
    return wg.abs() / (w.clamp(min=eps) * g.clamp(min=eps))


def length(w: Tensor) -> Tensor:
    """The length of the whole from those of the rows."""
    return torch.linalg.vector_norm(w, dim=1, keepdim=True)
