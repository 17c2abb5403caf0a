"""Tensors of which every process holds a part, and the lengths of the whole ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor


def is_sharded(t: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return isinstance(t, DTensor) and not all(at.is_replicate() for at in t.placements)


def local(t: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def summed(parts: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sums over whole tensors, (len(tensors),), from those over the parts here; one transfer, none for whole tensors.

    All processes must call it alike.
    """
    sharded = [is_sharded(t) for t in tensors]
    meshes = {t.device_mesh for t, is_part in zip(tensors, sharded, strict=True) if is_part}  # type: ignore[attr-defined]
    for mesh in meshes:
        mine = [is_part and t.device_mesh == mesh for t, is_part in zip(tensors, sharded, strict=True)]  # type: ignore[attr-defined]
        if all(mine):
            distributed.all_reduce(parts, group=mesh.get_group())
        else:
            chosen = torch.tensor(mine).to(parts.device, non_blocking=True)
            total = torch.where(chosen, parts, 0)
            distributed.all_reduce(total, group=mesh.get_group())
            parts = torch.where(chosen, total, parts)
    return parts


def norms(tensors: Sequence[Tensor], order: int, dtype: torch.dtype) -> list[Tensor]:
    """‖t‖ of each tensor, order 1 or 2, 0-d, in `dtype`; of sharded ones the whole tensor's, by `summed`."""
    found = torch._foreach_norm([local(t) for t in tensors], order, dtype)
    if not any(is_sharded(t) for t in tensors):
        return list(found)
    powers = torch.stack(found)
    if order == 1:
        return list(summed(powers, tensors).unbind())
    return list(summed(powers.square_(), tensors).sqrt_().unbind())
