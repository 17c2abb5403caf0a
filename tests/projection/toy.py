"""A network and the training of it that the tests of projections share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from trainkit.optimizer.muon import Muon
from trainkit.optimizer.partition import Partition, roles
from trainkit.projection.projection import Projection
from trainkit.projection.spectral import SIX

WORDS, WIDTH = 11, 8


class Net(nn.Module):
    """Tokens -> logits, with tall, wide and square matrices, two of them of one shape."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(
            [nn.Linear(width, 3 * width), nn.Linear(3 * width, width), nn.Linear(width, width), nn.Linear(width, width)]
        )
        self.head = nn.Linear(width, WORDS, bias=False)
        self.head.role = "head"  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)

    def matrices(self) -> list[nn.Parameter]:
        return [layer.weight for layer in self.layers]


def muon(model: nn.Module, *, scale: str = "ratio", **settings) -> Optimizer:
    """Muon as the constraints are made for: every update is lr c O with singular values of O below 1."""
    found = roles(model)
    made = Muon(
        found.pop("matrix"),
        nesterov=False,
        steps=6,
        coefficients=SIX,
        eps=1e-12,
        scale=scale,
        dtype="parameter",
        **settings,
    )
    return Partition([made, torch.optim.AdamW([p for ps in found.values() for p in ps], lr=0.01)])


def train(model: nn.Module, optimizer: Optimizer, projection: Projection, steps: int):
    """Fits noise, as whoever trains does it; yields after every step, before the projection and after it."""
    projection.prepare(optimizer)
    projection(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens, targets = torch.randint(WORDS, (2, 16), generator=generator)
        optimizer.zero_grad()
        (F.cross_entropy(model(tokens), targets) + projection.penalty(model)).backward()
        optimizer.step()
        yield False
        projection(model)
        yield True


def top(p: Tensor) -> float:
    """The largest singular value over c = sqrt(fan_out / fan_in)."""
    return float(torch.linalg.matrix_norm(p.detach().double(), 2) / (p.shape[0] / p.shape[1]) ** 0.5)


def with_values(values: Tensor, m: int, n: int, seed: int = 0) -> Tensor:
    """An (m, n) matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=values.dtype))
    v, _ = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=values.dtype))
    return (u * values) @ v.mT
