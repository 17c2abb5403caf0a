"""Where in a network a number that is none came from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainkit.measure.modes import uncompiled


class _Found(Exception):
    """Ends the forward pass at the first value that is not finite."""


def non_finite(value: Any) -> bool:
    """Whether any floating-point tensor in `value`, nested in tuples, lists and dicts, has NaN or infinity in it."""
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return any(not bool(tensor.isfinite().all()) for tensor in tensors)


@torch.no_grad()
def first_non_finite_output(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The name of the first of the model's modules, as they finish, whose output is not finite, or None.

    forward() takes the model through the batch in question. A module finishes after those inside it, so the innermost
    one is named: blocks.3.mlp.f.up before blocks.3.mlp; what a module computes itself, between the modules inside it,
    goes by its own name. The model's buffers are put back; random numbers are the caller's to look after. The pass ends
    at the first such value.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if non_finite(output):
            found.append(name or "the model")
            raise _Found

    hooks = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules()]
    try:
        with uncompiled(model):
            forward()
    except _Found:
        return found[0]
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
    return None
