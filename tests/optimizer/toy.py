"""Parameters of every shape, steps against a formula, and an optimizer that was saved and loaded."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SHAPES = ((), (1,), (7,), (12, 5), (4, 9), (1, 6), (5, 3, 3, 3))
Make = Callable[[list[nn.Parameter]], Optimizer]
Formula = Callable[[int, Tensor, Tensor, dict[str, Tensor]], Tensor]


def parameters(shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def gradients(params: Sequence[Tensor], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
    return [torch.empty_like(p).copy_(g) for p, g in zip(params, drawn, strict=True)]  # in p's layout


def give(params: Sequence[nn.Parameter], step: int) -> list[Tensor]:
    for p, g in zip(params, gradients(params, step), strict=True):
        p.grad = g
    return [p.grad for p in params]  # type: ignore[misc]


def take(optimizer: Optimizer, params: Sequence[nn.Parameter], steps: int, first: int = 1) -> None:
    for t in range(first, first + steps):
        give(params, t)
        optimizer.step()


def follows(make: Make, formula: Formula, steps: int = 5, params: list[nn.Parameter] | None = None) -> None:
    """Each parameter by itself: W after step t is formula(t, W before it, g, what the formula remembers)."""
    params = parameters() if params is None else params
    optimizer = make(params)
    expected: list[Tensor] = [p.detach().clone() for p in params]
    memory: list[dict[str, Tensor]] = [{} for _ in params]
    for t in range(1, steps + 1):
        given = give(params, t)
        before = [g.clone() for g in given]
        expected = [formula(t, w, g, kept) for w, g, kept in zip(expected, before, memory, strict=True)]
        optimizer.step()
        for w, p, g, old in zip(expected, params, given, before, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-13)
            assert torch.equal(g, old), "the gradient was changed"


def same(
    a: Make,
    b: Make,
    steps: int = 4,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    rtol: float = 1e-11,
    atol: float = 1e-13,
    dtype: torch.dtype = torch.float64,
) -> None:
    """Two optimizers take the same steps, at a learning rate that changes."""
    ours, theirs = parameters(shapes, dtype), parameters(shapes, dtype)
    for optimizer, params in ((a(ours), ours), (b(theirs), theirs)):
        for t in range(1, steps + 1):
            take(optimizer, params, 1, first=t)
            for group in optimizer.param_groups:
                group["lr"] *= 0.7
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


def resumes(make: Make, dtype: torch.dtype = torch.bfloat16) -> None:
    """Saved, loaded with weights_only into a new optimizer, the next steps are the same to the bit."""
    params = parameters(dtype=dtype)
    optimizer = make(params)
    take(optimizer, params, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    again = make(others)
    again.load_state_dict(torch.load(file, weights_only=True))
    take(optimizer, params, 3, first=4)
    take(again, others, 3, first=4)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def state_bytes(optimizer: Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
