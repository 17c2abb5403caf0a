"""Replacing modules inside a built model."""

from collections.abc import Callable

from torch import nn


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
