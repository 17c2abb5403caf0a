"""Norms of whole parameters and of all of them, as tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainkit.measure.shards import local
from trainkit.optimizer.multi_tensor import Tensors, wide


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """‖t‖ of each tensor, all on one device: (len(tensors),), in at least float32."""
    return torch.stack(torch._foreach_norm([local(t) for t in tensors], 2, dtype=wide(tensors[0].dtype)))


def squares(tensors: Tensors) -> Sequence[Tensor]:
    """‖t‖² of each tensor, in a rule."""
    if torch.compiler.is_compiling():  # which does not fuse _foreach_norm
        return [(t * t).sum() for t in tensors]
    if tensors[0].is_cpu and all(t.is_contiguous() for t in tensors):
        flat = [t if t.ndim == 1 else t.view(-1) for t in tensors]
        return [torch.dot(t, t) for t in flat]  # faster than norm, and of blocks as exact
    return torch._foreach_pow(torch._foreach_norm(tensors), 2)


def norm_of_all(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors as one vector, 0-d, on the device of the first one."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        found.setdefault((t.device, t.dtype), []).append(t)
    parts = [torch.linalg.vector_norm(norms(part)).to(tensors[0].device) for part in found.values()]
    return torch.linalg.vector_norm(torch.stack(parts)) if len(parts) > 1 else parts[0]


def norms_of_pieces(pieces: Sequence[Sequence[Sequence[Tensor]]]) -> Tensor:
    """The norms of whole tensors from the squares of those of their pieces, several kinds at once: (kinds, tensors)."""
    kinds = len(pieces[0][0])
    flat = torch.stack([square for squares in pieces for kind in squares for square in kind]).view(-1, kinds)
    if len(flat) > len(pieces):
        owners = torch.tensor([i for i, squares in enumerate(pieces) for _ in squares], device=flat.device)
        flat = flat.new_zeros(len(pieces), kinds).index_add_(0, owners, flat)
    return flat.sqrt().T


def ratios(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 1 where either is 0."""
    return torch.where((a > 0) & (b > 0), a / b, 1.0)
