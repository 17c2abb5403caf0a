"""What was asked for and yet ends up in no module."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn


def unused_norm_layer(
    words: Sequence[str], factory: Callable[[int], nn.Module], width: int, model: nn.Module
) -> str | None:
    """One line where norm_layer= was typed and the model has no such module, as under norm=rezero; else None."""
    asked = next((word for word in words if word.startswith("norm_layer=")), None)
    if asked is None:
        return None
    kind = type(factory(width))
    if kind is nn.Identity or any(isinstance(module, kind) for module in model.modules()):
        return None
    return f"{asked} is used by no module: this model and placement have no norm of that kind"
