"""A network as it was: a frozen copy, and what its last layer is given."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Teacher:
    """A copy of a model in eval mode, without gradient, or none yet. No module: nobody optimizes or broadcasts it."""

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._loaded: dict[str, Any] | None = None  # from a checkpoint, until a model shows what it belongs to

    def take(self, model: nn.Module) -> None:
        """Copies the model as it is."""
        self._model, self._loaded = frozen(model), None

    def of(self, model: nn.Module) -> nn.Module:
        """The copy; model: the one that it was taken from, at whatever weights."""
        if self._loaded is not None:
            self._model = frozen(model)
            self._model.load_state_dict(self._loaded)
            self._loaded = None
        assert self._model is not None, "no copy was taken"
        return self._model

    def state_dict(self) -> dict[str, Any] | None:
        if self._model is None:
            return self._loaded
        return {name: value.clone() for name, value in self._model.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        self._model, self._loaded = None, state


def frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradient."""
    # What a layer holds of its last forward, such as a penalty, is part of a graph, which cannot be copied.
    held = [value for module in model.modules() for value in vars(module).values()]
    held += [value for values in held if isinstance(values, list | tuple | deque) for value in values]
    memo = {id(value): value.detach() for value in held if isinstance(value, Tensor) and not value.is_leaf}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


@contextmanager
def penultimate(model: nn.Module, *, wanted: bool = True) -> Iterator[list[Tensor]]:
    """A list into which a forward within puts what the layer with the role "head" is given: (B, width).

    Caught on its way in the one forward there is, which leaves the statistics of norm layers as they would be without.
    ValueError where the model names no such layer.
    """
    caught: list[Tensor] = []
    if not wanted:
        yield caught
        return
    heads = [module for module in model.modules() if getattr(module, "role", None) == "head"]
    if len(heads) != 1:
        raise ValueError(
            f"feat_kd compares the features that the last layer is given, but {type(model).__name__} has {len(heads)} "
            'layers of the role "head", and must have one: self.head.role = "head". Or try learner=pred_kd'
        )
    handle = heads[0].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        yield caught
    finally:
        handle.remove()
