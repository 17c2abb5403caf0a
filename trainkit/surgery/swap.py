"""Replacing modules inside a built model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

Kind = TypeVar("Kind", bound=nn.Module)


def swap(
    model: nn.Module, old: type[nn.Module], make: Callable[[nn.Module], nn.Module], *, key: str = "the swap"
) -> nn.Module:
    """Replaces every module of type `old` (exactly, no subclasses) by make(module), in place; returns the model.

    Raises ValueError, naming `key` (the configuration choice that asked for it), when there is nothing to replace.
    """
    if type(model) is old:
        return make(model)
    targets = [name for name, module in model.named_modules() if type(module) is old]
    if not targets:
        raise ValueError(f"{key} needs {old.__name__}; the model has none")
    for name in targets:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, make(getattr(owner, child)))
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts `module` in the place of model.<name>, in place; returns the model, which is `module` for the name ""."""
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def recast(module: nn.Module, kind: type[Kind]) -> Kind:
    """`module` as one of its subclass `kind`: the same settings, hooks, parameters and buffers; nothing is built anew.

    What `kind` has beyond is for the caller to set. The module given must not be used any more.
    """
    assert issubclass(kind, type(module))
    twin = kind.__new__(kind)
    twin.__dict__.update(module.__dict__)
    return twin
