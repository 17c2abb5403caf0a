"""Parameters seen as matrices, in stacks of one shape: what the methods share that project matrices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, run, wide
from trainkit.optimizer.orthogonal import by_shape


@dataclass
class Stack:
    """Matrices of one shape that are stepped together, k of them: all those of a bucket on an accelerator, where their
    products become one; one on a CPU, where copying matrices into a stack takes longer than what the stack saves.

    A parameter with more axes, such as a filter bank, is the matrix (first axis, everything else). flip: the matrices
    are seen transposed, so that the axis to be projected, of length n, is the last one: (k, m, n).
    """

    params: list[Tensor]
    tensors: list[Tensor]  # gradients
    states: list[dict[str, Any]]
    step: int
    flip: bool

    def see(self, t: Tensor) -> Tensor:
        """A tensor of a parameter's shape as an m × n matrix; a view where it lies contiguous."""
        return t.flatten(1).mT if self.flip else t.flatten(1)

    @cached_property
    def gradient(self) -> Tensor:
        """(k, m, n), in at least float32."""
        return stacked([self.see(g).to(wide(g.dtype)) for g in self.tensors])

    def each(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]

    def state(self, name: str) -> Tensor:
        """(k, ...): of a single matrix the state itself, else a copy."""
        return stacked(self.each(name))

    def keep(self, name: str, value: Tensor) -> None:
        """Writes (k, ...) to the states; nothing to do where it is the state."""
        put(self.each(name), value)

    def seen(self, name: str) -> Tensor:
        """As `state`, of a state shaped like the parameter and contiguous: (k, m, n)."""
        return stacked([self.see(t) for t in self.each(name)])

    def keep_seen(self, name: str, value: Tensor) -> None:
        put([self.see(t) for t in self.each(name)], value)

    def add(self, x: Tensor, y: Tensor, *, alpha: float, beta: float = 1.0, rows: Tensor | None = None) -> None:
        """W <- beta W + alpha (x @ y + rows · gradient); x: (k, m, r), y: (k, r, n), rows: (k, m, 1)."""
        p = self.params[0]
        if len(self.params) == 1 and p.dtype == x.dtype and p.is_contiguous():  # in place, nothing of W's size is made
            w = self.see(p)
            w.addmm_(x[0], y[0], beta=beta, alpha=alpha)
            if rows is not None:
                w.addcmul_(self.gradient[0], rows[0], value=alpha)
        else:
            u = product(x, y) if rows is None else torch.baddbmm(self.gradient * rows, x, y)
            u = u.mT if self.flip else u
            run(blend, self.params, [t.reshape(p.shape) for t in u.unbind()], alpha=alpha, beta=beta)


def product(a: Tensor, b: Tensor) -> Tensor:
    """The products of two stacks: (k, m, r), (k, r, n) -> (k, m, n). A stack of one is multiplied as a matrix, which a
    CPU does faster."""
    return torch.mm(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b)


def blend(w: list[Tensor], u: list[Tensor], *, alpha: float, beta: float) -> None:
    if beta != 1.0:
        torch._foreach_mul_(w, beta)
    torch._foreach_add_(w, u, alpha=alpha)


def put(kept: Sequence[Tensor], value: Tensor) -> None:
    for t, new in zip(kept, value.unbind(), strict=True):
        if new.data_ptr() != t.data_ptr():
            t.copy_(new)


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


class MatrixOptimizer(MultiTensorOptimizer):
    """A MultiTensorOptimizer for matrices: a leaf says how a Stack moves (`advance`).

    Raises ValueError for parameters that are no matrices, and for a rank that a matrix does not have.
    """

    whole = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "update_proj_gap" in group and group["update_proj_gap"] < 1:
            raise ValueError(f"optimizer.update_proj_gap counts steps, from 1; got {group['update_proj_gap']}")
        for p in group["params"]:
            if p.ndim < 2:
                raise ValueError(
                    f"{type(self).__name__} steps matrices, this parameter has shape {tuple(p.shape)}. "
                    "Try optimizer.takes=[matrix] optimizer/rest=adamw"
                )
            if "rank" in group:
                rank_of(p, group)

    def flips(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether a parameter is seen transposed. Here: so that no matrix is wider than it is high."""
        m, n = sides(p)
        return m < n

    def advance(self, s: Stack, group: dict[str, Any]) -> None:
        """Moves the matrices of a stack, in place."""
        raise NotImplementedError

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        for s in self.stacks(bucket, group):
            self.advance(s, group)

    def stacks(self, bucket: Bucket, group: dict[str, Any]) -> Iterator[Stack]:
        rows = list(zip(bucket.params, bucket.gradients, bucket.states, strict=True))
        for chosen in together(bucket.params):
            params, gradients, states = map(list, zip(*(rows[i] for i in chosen), strict=True))
            yield Stack(params, gradients, states, bucket.step, self.flips(params[0], group))


def together(params: Sequence[Tensor]) -> list[list[int]]:
    """Which parameters make a Stack."""
    return [[i] for i in range(len(params))] if params[0].is_cpu else by_shape(params)


def sides(p: Tensor) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix."""
    return p.shape[0], p.shape[1:].numel()


def rank_of(p: Tensor, group: dict[str, Any]) -> int:
    """optimizer.rank for one matrix: a number of directions, or a share of its smaller side (a float up to 1.0)."""
    rank, small = group["rank"], min(sides(p))
    r = max(1, round(rank * small)) if isinstance(rank, float) and 0 < rank <= 1 else rank
    if not (isinstance(r, int) and 1 <= r <= small):
        raise ValueError(
            f"optimizer.rank is a whole number up to the smaller side of every matrix, or a share of it in (0, 1]; "
            f"got {rank} for shape {tuple(p.shape)}. Try optimizer.rank={small}, or optimizer.rank=0.25"
        )
    return r


def zeros(p: Tensor, *shape: int) -> Tensor:
    """State of another shape than p's, on its device and in at least float32."""
    return torch.zeros(shape, dtype=wide(p.dtype), device=p.device)
