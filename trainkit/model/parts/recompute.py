"""Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): memory for time, block by block."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Recomputed:
    """Mixed into a module's class: in training, its forward keeps its inputs alone, and runs again in the backward.

    Numbers are the same bit for bit, dropout's included; parameters and buffers keep their names. Costs one more
    forward of the module.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = super().forward  # type: ignore[misc]
        if not (self.training and torch.is_grad_enabled()):  # type: ignore[attr-defined]
            return plain(*args, **kwargs)
        return checkpoint(plain, *args, use_reentrant=False, **kwargs)


def recompute(module: nn.Module) -> None:
    """Makes a module one that is `Recomputed`, in place; one that is already stays as it is."""
    if not isinstance(module, Recomputed):
        module.__class__ = recomputed(type(module))


@cache
def recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    """One class for all modules of a kind, so that compiled ones share their kernels."""
    return type(kind.__name__, (Recomputed, kind), {"__module__": kind.__module__})


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts that a network repeats: `model.blocks`, else the longest of its lists of modules; [] without any."""
    lists = [m for m in model.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)]
    declared = getattr(model, "blocks", None)
    return list(declared if isinstance(declared, nn.ModuleList) else max(lists, key=len, default=[]))
