"""Sums over ranks inside a formula that autograd differentiates; those of channels.py serve hand-written kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.norm_layer.channels import over_ranks, synchronized


def summed(sync: str, value: Tensor) -> Tensor:
    """The sum of `value` over all ranks for sync=mean, else the value itself.

    In the backward the gradients are summed alike: what a rank put in takes part in the losses of all.
    """
    return Summed.apply(value, sync) if synchronized(sync) else value


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value: Tensor, sync: str) -> Tensor:  # type: ignore[override]
        ctx.sync = sync
        return over_ranks(sync, value)[0]

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[override]
        return over_ranks(ctx.sync, g)[0], None
