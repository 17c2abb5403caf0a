"""The discrete cosine transform as a fixed orthogonal basis, and the choice of its vectors."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

BASES = ("dct3", "dct2")


@functools.cache
def dct(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Q (n × n), Q_ij = √(2/n) cos(π i (2j + 1) / (2n)), row 0 times √½: rows are frequencies, Q Qᵀ = I.

    Built in float64. One per size, device and dtype, shared and never written to: 4 n² bytes beside the states.
    """
    i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
    angle = (i * (2 * j + 1)) % (4 * n)  # whole turns off while these are whole numbers: cos of large ones is inexact
    q = torch.cos(angle.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
    q[0] *= math.sqrt(0.5)
    return q.to(dtype).to(device)


@functools.cache
def basis(name: str, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The vectors that can be chosen, as rows that lie contiguous: dct3 the columns of Q, dct2 its rows."""
    q = dct(n, device, dtype)
    return q.T.contiguous() if name == "dct3" else q


def select(g: Tensor, rows: Tensor, rank: int, ell_norm: int) -> tuple[Tensor, Tensor]:
    """The `rank` basis vectors that g has most of: their numbers (k, r), and g's part (k, m, r).

    g: (k, m, n), rows: (n, n). Ranked by the l1 or l2 norms of the columns of g rowsᵀ, the largest first.
    """
    s = torch.matmul(g, rows.mT)
    norms = s.abs().sum(-2) if ell_norm == 1 else torch.linalg.vecdot(s, s, dim=-2)  # vector_norm: ten times slower
    indices = norms.topk(rank).indices
    return indices, columns(s, indices)


def columns(t: Tensor, indices: Tensor) -> Tensor:
    """t[:, indices] of each matrix: (k, m, n), (k, r) -> (k, m, r)."""
    if len(t) == 1:
        return t[0].index_select(1, indices[0])[None]
    return t.gather(-1, indices[:, None, :].expand(-1, t.shape[-2], -1))


def vectors(rows: Tensor, indices: Tensor) -> Tensor:
    """Chosen rows: (n, n), (k, r) -> (k, r, n)."""
    return rows.index_select(0, indices.flatten()).view(*indices.shape, -1)


def rotated(moments: Tensor, old: Tensor, new: Tensor) -> Tensor:
    """moments B_oldᵀ B_new, exactly: what slot i of the old choice (k, r) holds goes where the new one has the same
    vector; slots of vectors that were not there before start from 0."""
    same = old[:, :, None] == new[:, None, :]
    return columns(moments, same.byte().argmax(-2)).mul_(same.any(-2)[:, None, :])


def check_ranking(group: dict[str, Any]) -> None:
    if group["ell_norm"] not in (1, 2):
        raise ValueError(f"optimizer.ell_norm is 1 or 2; got {group['ell_norm']}")
