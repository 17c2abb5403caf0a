"""Looking at a network without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Everything in eval mode and uncompiled, and afterwards each module in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with uncompiled(model):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Compiled parts run as they are written, so that hooks inside them are called and transforms see through them."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        yield  # without importing the compiler
        return
    with torch.compiler.set_stance("force_eager"):
        yield
