"""What an optimizer holds, measured: its own step, on imitated parameters of the same shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.optimizer import multi_tensor
from trainkit.optimizer.partition import over_roles, split
from trainkit.plan.ledger import imitating, storages

PIECES = 8  # that the largest parameter is stepped in where an optimizer goes over it block by block


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes. state: of the tensors in Optimizer.state, by role; beside: what else stays between steps (copies of
    weights, a basis); step: what a step needs on top of both while it lasts."""

    state: dict[str, int]
    beside: int
    step: int

    @property
    def kept(self) -> int:
        return sum(self.state.values()) + self.beside


def optimizer_memory(found: Mapping[str, Sequence[Tensor]], factory: partial[Optimizer]) -> OptimizerMemory:
    """found: the parameters by role (trainkit.optimizer.partition.roles), of which shapes and dtypes count.

    Two steps are made with at most two parameters of each role, shape and dtype, as further ones hold the same. State
    that parameters share counts once. Temporary memory is that of a CPU: where parameters of one shape are stacked on
    an accelerator, it is larger there.
    """
    make, words = split(factory)
    largest = max((t.numel() for tensors in found.values() for t in tensors), default=0)
    with coarse(largest // PIECES), imitating() as ledger:
        alike: dict[tuple[Any, ...], list[nn.Parameter]] = {}
        counts: dict[tuple[Any, ...], int] = {}
        for role, tensors in found.items():
            for t in tensors:
                key = (role, t.shape, t.dtype)
                counts[key] = counts.get(key, 0) + 1
                if counts[key] <= 2:
                    alike.setdefault(key, []).append(nn.Parameter(torch.empty(t.shape, dtype=t.dtype)))
        for params in alike.values():
            for p in params:
                p.grad = torch.empty_like(p)
        ledger.mark("before")
        optimizer = over_roles(
            {role: [p for key, params in alike.items() if key[0] == role for p in params] for role in found},
            make,
            **words,
        )
        extra = 0
        for step in ("first", "second"):
            ledger.mark(step)
            optimizer.step(lambda: 0.0)  # a closure, which optimizers that look twice ask for
            extra = max(extra, ledger.peak - ledger.live)
        state: dict[str, int] = {}
        per_parameter = 0
        seen: dict[Any, int] = {}
        for key, params in alike.items():
            of_state = _scaled(params, optimizer.state, counts[key], seen)
            state[key[0]] = state.get(key[0], 0) + of_state
            per_parameter += sum(_scaled(params, held, counts[key], seen) for held in _beside(optimizer))
        kept = ledger.live - ledger.stretch("before").start  # type: ignore[union-attr]
        return OptimizerMemory(state, per_parameter + max(0, kept - sum(seen.values())), extra)


@contextmanager
def coarse(elements: int) -> Iterator[None]:
    """Inside, rules that run block by block take blocks of at least so many elements: a few calls, not thousands."""
    before = multi_tensor.BLOCK
    multi_tensor.BLOCK = max(before, elements)
    try:
        yield
    finally:
        multi_tensor.BLOCK = before


def _scaled(params: Sequence[Tensor], held: Mapping[Any, Any], count: int, seen: dict[Any, int]) -> int:
    """The bytes that `count` parameters like these hold, each further one as many as the second; notes the storages."""
    sizes = []
    for p in params:
        mine = storages(held[p]) if p in held else {}
        sizes.append(sum(size for key, size in mine.items() if key not in seen))
        seen |= mine
    return sizes[0] + (count - 1) * sizes[-1] if count > 1 else sizes[0]


def _beside(optimizer: Optimizer) -> list[Mapping[Any, Any]]:
    """What an optimizer keeps by parameter, apart from its state."""
    tables = [value for name, value in vars(optimizer).items() if isinstance(value, dict) and name != "state"]
    return [table for table in tables if any(isinstance(key, Tensor) for key in table)]
