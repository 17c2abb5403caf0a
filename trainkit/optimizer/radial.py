"""The radial part of an update, for weights that a normalization makes scale-invariant (Heo et al. 2021,
arXiv:2006.08217).

Behind a normalization the length of a row W_i of a weight, or of the whole weight, has no effect on the loss: the
gradient is orthogonal to it. Momentum still lets that length grow, which shrinks the effective learning rate. AdamP
and SGDP recognize such weights by the angle between W and g, and take the radial part out of the update u:

    c_i = |⟨W_i, g_i⟩| / (max(‖W_i‖, ε) · max(‖g_i‖, ε));  where max_i c_i < δ / √d:  u_i <- u_i - Ŵ_i ⟨Ŵ_i, u_i⟩,

Ŵ_i = W_i / (‖W_i‖ + ε), d the length of W_i. The rows W_i are first the rows of the weight (the filters of a
convolution); if one of them is too little orthogonal, the whole weight is taken for one row; if that is as well, u
stays as it is. On an accelerator everything is decided by masks; on a CPU, which waits for nothing, the weights whose u
stays as it is are told from the others first, and stepped without u being kept.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, Tensors, run
from trainkit.optimizer.orthogonal import by_shape


@dataclass
class Alignment:
    """How a weight lies to its gradient.

    lengths, dots: ‖W_i‖ and ⟨W_i, g_i⟩, (rows, 1); by_row, whole: whether the two are orthogonal in all rows, and as
    one row, (1, 1).
    """

    lengths: Tensor
    dots: Tensor
    by_row: Tensor
    whole: Tensor


def divided(
    bucket: Bucket, *, delta: float, eps: float, compile: bool
) -> Iterator[tuple[Bucket, Bucket, list[Alignment]]]:
    """The weights of a bucket, a few at a time: those whose updates stay as they are, none on an accelerator; those
    whose updates may be projected; and how these lie to their gradients."""
    for window in bucket.windows():
        found = align(window, delta=delta, eps=eps, compile=compile)
        chosen = candidates(found)
        kept, projected = ([i for i, one in enumerate(chosen) if one is side] for side in (False, True))
        yield window.pick(kept), window.pick(projected), [found[i] for i in projected]


def candidates(found: Sequence[Alignment]) -> list[bool]:
    """Of each weight, whether its update may be projected: on a CPU whether it is, on an accelerator True."""
    if not found[0].whole.is_cpu:
        return [True] * len(found)
    return torch.cat([one.by_row | one.whole for one in found]).flatten().tolist()


def align(bucket: Bucket, *, delta: float, eps: float, compile: bool = False) -> list[Alignment]:
    """How each weight of a bucket lies to its gradient. Weights of one shape are decided together."""
    pieces = run(traces, bucket.params, bucket.gradients, rows=True, reads=True, compile=compile)
    found: dict[int, Alignment] = {}
    for at in by_shape(bucket.params, elements=sys.maxsize):
        w, g, wg = torch.stack([torch.cat(pieces[i], dim=1) for i in at], dim=1)[..., None]  # (at, rows, 1)
        rows, d = w.shape[1], bucket.params[at[0]].shape[1:].numel()
        by_row = cosines(w, g, wg, eps).amax(1, keepdim=True) < delta / math.sqrt(d)
        whole = cosines(length(w), length(g), wg.sum(1, keepdim=True), eps) < delta / math.sqrt(rows * d)
        found.update((i, Alignment(*one)) for i, *one in zip(at, w, wg, by_row, whole, strict=True))
    return [found[i] for i in range(len(pieces))]


def projections(
    found: Sequence[Alignment], dots: Sequence[Tensor], *, eps: float, ratio: float
) -> tuple[list[Tensor], list[Tensor]]:
    """For each weight, of which `dots` holds ⟨W_i, u_i⟩: (rows, 1), the projection and the factor of the decay.

    The projection q: (rows, 1) is such that u - q W is the projected update, 0 where W and g are not orthogonal. The
    factor ρ: (1, 1) is `ratio` where they are, else 1. Weights with equally many rows are worked on together.
    """
    q: dict[int, Tensor] = {}
    rho: dict[int, Tensor] = {}
    for at in by_shape(dots, elements=sys.maxsize):
        wu = torch.stack([dots[i] for i in at])  # (at, rows, 1)
        lengths = torch.stack([found[i].lengths for i in at])
        by_row = torch.stack([found[i].by_row for i in at])
        whole = torch.stack([found[i].whole for i in at])
        of_rows = wu / (lengths + eps).square()
        of_all = wu.sum(1, keepdim=True) / (length(lengths) + eps).square()
        q.update(zip(at, torch.where(by_row, of_rows, torch.where(whole, of_all, 0.0)), strict=True))
        rho.update(zip(at, (by_row | whole).to(wu.dtype) * (ratio - 1) + 1, strict=True))
    return [q[i] for i in range(len(found))], [rho[i] for i in range(len(found))]


def traces(w: Tensors, g: Tensors) -> list[Tensor]:
    """‖W_i‖, ‖g_i‖ and ⟨W_i, g_i⟩ of matrices (rows, d), or of some of their rows: (3, rows) each."""
    norm, dot = torch.linalg.vector_norm, torch.linalg.vecdot
    return [torch.stack([norm(a, dim=-1), norm(b, dim=-1), dot(a, b)]) for a, b in zip(w, g, strict=True)]


def products(w: Tensors, u: Tensors) -> list[Tensor]:
    """⟨W_i, u_i⟩ of matrices, or of some of their rows: (rows, 1) each."""
    return [torch.linalg.vecdot(a, b)[:, None] for a, b in zip(w, u, strict=True)]


def cosines(w: Tensor, g: Tensor, wg: Tensor, eps: float) -> Tensor:
    return wg.abs() / (w.clamp(min=eps) * g.clamp(min=eps))


def length(w: Tensor) -> Tensor:
    """The length of the whole from those of the rows."""
    return torch.linalg.vector_norm(w, dim=1, keepdim=True)
