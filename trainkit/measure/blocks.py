"""The blocks of a network, the hidden states between them, and the network without one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

FIRST = "embed"  # the hidden state that the first block reads


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """{"blocks.0": module, …} in the order of the network; {} where the model has no `blocks`."""
    model = getattr(model, "_orig_mod", model)  # a compiled model's own
    found = getattr(model, "blocks", None)
    return {f"blocks.{name}": block for name, block in found.named_children()} if isinstance(found, nn.Module) else {}


def hidden_state(stream: Any, *, stacked: bool = False) -> Tensor:
    """What flows between blocks -> (B, T, C), whatever the placement and the model.

    Tokens (B, T, C) are taken as they are; features (B, C) are one token each; images (B, C, H, W) have their positions
    as tokens. Of several streams in a stack, (B, T, S, C) with `stacked` (norm=hyper), it is the mean over S, whose sum
    is what the head reads; a tuple of streams (norm=residual_dual) is put side by side, channels one after the other.
    """
    if isinstance(stream, (tuple, list)):
        return torch.cat([hidden_state(one, stacked=stacked) for one in stream], dim=-1)
    if stacked:
        stream = stream.mean(-2)
    elif stream.dim() == 4:
        stream = stream.flatten(2).mT
    return stream.unsqueeze(1) if stream.dim() == 2 else stream


class Recording:
    """A context in which a forward pass leaves the input of the first block and every block's output in `states`.

    states: {"embed": (B, T, C), "blocks.0": (B, T, C), …}; `alike`: the blocks whose output has the shape of their
    input, so could be left out. Both are of the last pass.
    """

    def __init__(self, model: nn.Module):
        self.blocks = blocks(model)
        before = getattr(getattr(model, "_orig_mod", model), "before", None)
        self.stacked = hasattr(before, "streams")
        self.states: dict[str, Tensor] = {}
        self.alike: list[str] = []

    def __enter__(self) -> Recording:
        self._hooks = [
            block.register_forward_hook(partial(self._note, name, first))
            for (name, block), first in zip(self.blocks.items(), [True] + [False] * len(self.blocks), strict=False)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, first: bool, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if first:
            self.states, self.alike = {FIRST: self._state(args[0])}, []
        before, after = next(reversed(self.states.values())), self._state(output)
        self.states[name] = after
        if before.shape == after.shape:
            self.alike.append(name)

    def _state(self, stream: Any) -> Tensor:
        return hidden_state(stream, stacked=self.stacked).detach()


@contextmanager
def without(block: nn.Module) -> Iterator[None]:
    """Inside, `block` hands on what it is given, and costs nothing."""
    block.forward = lambda stream, *_, **__: stream  # type: ignore[method-assign]
    try:
        yield
    finally:
        del block.forward  # uncovers the class's own
