"""What the tests of the continual layers share: float64, and small images with tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

from trainkit.norm_layer.task_ids import announce

WIDTH, TASKS = 6, 3


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def images(count: int, *, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    """x and the gradient that arrives at y."""
    return 2 * torch.randn(count, width, 3, 2) + 1, torch.randn(count, width, 3, 2)


def perturbed(layer: nn.Module) -> nn.Module:
    """With parameters that are not at their neutral starting values."""
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def step(layer: nn.Module, x: Tensor, gy: Tensor, ids: list[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A training forward and backward: y and the gradient of x."""
    announce(layer, torch.as_tensor(ids) if ids is not None else None)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(gy)
    return y.detach(), x.grad


def equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-11)


RANKS = 2


def on_ranks(outcome: Callable[[int], Any], folder: Path) -> list[Any]:
    """What outcome(rank), a function of a module, returns in each of RANKS gloo processes, in float64."""
    multiprocessing.spawn(_on_rank, (outcome, str(folder)), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def _on_rank(rank: int, outcome: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save(outcome(rank), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
