"""What a model and its optimizer's state take, measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


def footprint(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """parameters: trainable numbers of the model; optimizer_state_bytes: what the state of this process occupies."""
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer_state_bytes": state_bytes(optimizers),
    }


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """The bytes of all tensors in the optimizers' states; memory that several share counts once, views in full."""
    memory: dict[Any, int] = {}
    for optimizer in optimizers:
        for tensor in _tensors(list(optimizer.state.values())):
            local = getattr(tensor, "_local_tensor", tensor)  # of a sharded one, the part that lies here
            storage = local.untyped_storage()
            memory[local.device, storage.data_ptr()] = storage.nbytes()
    return sum(memory.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
