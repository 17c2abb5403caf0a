"""The lengths of gradients, for treatments that look at them."""

from functools import reduce
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from trainkit.measure import shards


def norms(gradients: list[Tensor]) -> Tensor:
    """‖g‖ of each, (len(gradients),), in at least float32: squares overflow in half precision.

    Of a sharded gradient it is that of the whole, so every process must ask alike. Asked again about the same gradients
    while nobody has written to them, it gives what it found, so that the guard and the treatment cost one pass.
    """
    before, found = _latest
    known = len(before) == len(gradients) and all(
        seen() is g and version == g._version for (seen, version), g in zip(before, gradients, strict=True)
    )
    if not known:
        wide = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
        found = torch.stack(shards.norms(gradients, 2, wide))
        _latest[:] = [(ref(g), g._version) for g in gradients], found
    return found


# What was asked last: the gradients, by weak references and how often each was written to, and the answer.
_latest: list[Any] = [[], torch.empty(0)]


def scale_(gradients: list[Tensor], factors: Tensor) -> None:
    """Multiplies them by one factor, 0-d, or by one each, (len(gradients),); in place, of sharded ones what is here."""
    torch._foreach_mul_([shards.local(g) for g in gradients], factors if factors.ndim == 0 else list(factors.unbind()))
