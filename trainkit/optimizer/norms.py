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


def lengths(tensors: Tensors) -> Sequence[Tensor]:
    """‖t‖ of each tensor, in a rule."""
    if torch.compiler.is_compiling():  # which does not fuse _foreach_norm
        return [torch.linalg.vector_norm(t) for t in tensors]
    if tensors[0].is_cpu and all(t.is_contiguous() for t in tensors):
        return [torch.dot(t.view(-1), t.view(-1)).sqrt() for t in tensors]  # faster than norm, and of blocks as exact
    return torch._foreach_norm(tensors)


def norm_of_all(tensors: Sequence[Tensor]) -> Tensor:
    """The norm of all tensors as one vector, 0-d, on the device of the first one."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        found.setdefault((t.device, t.dtype), []).append(t)
    parts = [torch.linalg.vector_norm(norms(part)).to(tensors[0].device) for part in found.values()]
    return torch.linalg.vector_norm(torch.stack(parts)) if len(parts) > 1 else parts[0]


def norms_of_pieces(pieces: Sequence[Sequence[Tensor]]) -> Tensor:
    """‖t‖ of each tensor from those of its pieces: (len(pieces),)."""
    flat = torch.stack([norm for norms in pieces for norm in norms])
    if len(flat) == len(pieces):
        return flat
    owners = torch.tensor([i for i, norms in enumerate(pieces) for _ in norms], device=flat.device)
    return flat.new_zeros(len(pieces)).index_add_(0, owners, flat.square()).sqrt()


def ratios(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 1 where either is 0."""
    return torch.where((a > 0) & (b > 0), a / b, 1.0)
