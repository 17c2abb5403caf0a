"""Multiplying gradients, for treatments."""

import torch
from torch import Tensor

from trainkit.measure import shards


def scale_(gradients: list[Tensor], factors: Tensor) -> None:
    """Multiplies them by one factor, 0-d, or by one each, (len(gradients),); in place, of sharded ones what is here."""
    torch._foreach_mul_([shards.local(g) for g in gradients], factors if factors.ndim == 0 else list(factors.unbind()))
