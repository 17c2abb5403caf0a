"""The BatchNorms of a model, and layers of another kind in their place."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.norm_layer.batch import BatchNorm, BatchNorm2d
from trainkit.surgery.swap import swap

KINDS = (BatchNorm, BatchNorm2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def replace(model: nn.Module, make: Callable[[nn.Module], nn.Module], *, key: str) -> nn.Module:
    """Puts make(bn) into the place of each BatchNorm of a model, ours or torch's; returns the model.

    ValueError, naming `key`, where there is none, and where one is a part of another norm layer, cannot be learned or
    has no running statistics.
    """
    found = {type(module) for module in model.modules() if type(module) in KINDS}
    if not found:
        raise ValueError(f"{key} needs BatchNorm; the model has none. Try norm_layer=batch")
    for module in model.modules():
        if type(module) in KINDS and (module.weight is None or module.running_mean is None):
            lacks = "weight and bias" if module.weight is None else "running statistics"
            raise ValueError(f"{key} takes over BatchNorms as they are; the model has one without {lacks}")
        within = [child for child in module.children() if type(child) in KINDS]
        if within and hasattr(type(module), "leaks"):
            raise ValueError(
                f"{key} replaces BatchNorm, but the model's are parts of {type(module).__name__}. Try norm_layer=batch"
            )
    for kind in KINDS:
        if kind in found:
            model = swap(model, kind, make, key=key)
    return model


def settings(bn: Any) -> dict[str, Any]:
    """What a BatchNorm was built with, as the keywords of norm layers; torch's have their channels on axis 1."""
    sync = "mean" if isinstance(bn, nn.SyncBatchNorm) else getattr(bn, "sync", "none")
    momentum = {"eps": bn.eps, "momentum": bn.momentum}
    return {"axis": getattr(bn, "axis", 1), **momentum, "count": getattr(bn, "count", "call"), "sync": sync}


def inherit(layer: Any, bn: Any, *buffers: str) -> Any:
    """`layer` with the weight and bias of `bn`, the parameters themselves, its values of `buffers`, device and mode."""
    layer.to(bn.weight.device, bn.weight.dtype).train(bn.training)
    layer.weight, layer.bias = bn.weight, bn.bias
    for name in buffers:
        copy(getattr(bn, name), getattr(layer, name))
    return layer


@torch.no_grad()
def copy(source: Tensor, target: Tensor) -> None:
    target.copy_(source)


def fitting(groups: int, width: int) -> int:
    """`groups`, or where they do not divide the width the most of them that do: their greatest common divisor."""
    return gcd(groups, width)
