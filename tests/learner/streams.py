"""A small stream of tasks and networks for it, in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainkit.continual.strategy import Strategy
from trainkit.learner.learner import Batch, Learner, Stream

TASKS, PER_TASK, SIDE = 3, 2, 3


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def transform(raw: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled, and mirrored at random."""
    mirrored = torch.rand(len(raw), generator=generator) < 0.5
    x = raw.to(torch.get_default_dtype()) / 255
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def plain(raw: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return raw.to(torch.get_default_dtype()) / 255


def stream(*, augment: bool = False, seed: int = 0, rank: int = 0, world: int = 1) -> Stream:
    classes_of = [[PER_TASK * t + c for c in range(PER_TASK)] for t in range(TASKS)]
    how = transform if augment else plain
    return Stream(TASKS, TASKS * PER_TASK, classes_of, how, seed=seed, rank=rank, world=world)


def batch(task: int, size: int = 5, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(1000 * task + seed)
    raw = torch.randint(256, (size, 1, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    labels = PER_TASK * task + torch.randint(PER_TASK, (size,), generator=generator)
    return Batch(plain(raw), labels, torch.full((size,), task), raw)


class Network(nn.Module):
    """features, BatchNorm if asked for, and a head."""

    def __init__(self, norm: bool = True):
        super().__init__()
        self.body = nn.Linear(SIDE * SIDE, 7)
        self.norm = nn.BatchNorm1d(7) if norm else nn.Identity()
        self.head = nn.Linear(7, TASKS * PER_TASK)
        self.head.role = "head"

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.body(x.flatten(1))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def network(*, norm: bool = True, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(norm)


def begun(learner: Learner, **options) -> Any:
    learner.begin(stream(**options), Strategy())
    return learner


def refuse(model: nn.Module, batch: Batch) -> Tensor:
    """A loss that a learner with its own must not call."""
    raise AssertionError


def train(learner: Learner, model: nn.Module, tasks, steps: int = 4, lr: float = 0.1) -> list[float]:
    """Whole tasks; the losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=lr), []
    for task in tasks:
        learner.begin_task(model, task)
        losses += [step(learner, model, optimizer, batch(task, seed=n)) for n in range(steps)]
        learner.end_task(model, task, [batch(task, seed=n) for n in range(2)])
    return losses


def step(learner: Learner, model: nn.Module, optimizer: torch.optim.Optimizer, samples: Batch) -> float:
    loss, _ = learner(model, samples, refuse)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
