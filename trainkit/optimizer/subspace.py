"""The leading singular directions of a matrix, as a projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.matrices import MatrixOptimizer, Stack, product, sides, zeros

TYPES = ("std", "reverse_std", "left", "right", "full")


class SubspaceOptimizer(MatrixOptimizer):
    """A MatrixOptimizer that sees a matrix G (m × n) through the first r rows of Vᵀ in G = U S Vᵀ: P (r × n).

    proj_type: "right" as above; "left" the same for Gᵀ, so with columns of U; "std" the shorter side is projected
    (right where m >= n); "reverse_std" the longer one; "full" both. The state "projector" holds P, and for "full"
    "projector_left" holds the r columns of U as rows.
    """

    types: tuple[str, ...] = TYPES

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if (found := self.param_groups[-1]["proj_type"]) not in self.types:
            raise ValueError(f"optimizer.proj_type is one of {', '.join(self.types)}; got {found!r}")

    def flips(self, p: Tensor, group: dict[str, Any]) -> bool:
        m, n = sides(p)
        return {"std": m < n, "reverse_std": m >= n, "left": True}.get(group["proj_type"], False)

    def oriented(self, p: Tensor, group: dict[str, Any]) -> tuple[int, int]:
        """The sides (m, n) of a parameter as its Stack will see it."""
        m, n = sides(p)
        return (n, m) if self.flips(p, group) else (m, n)

    def projectors(self, p: Tensor, group: dict[str, Any], rank: int) -> dict[str, Tensor]:
        """The part of the state that `refresh` fills."""
        m, n = self.oriented(p, group)
        left = {"projector_left": zeros(p, rank, m)} if group["proj_type"] == "full" else {}
        return {"projector": zeros(p, rank, n), **left}


def refresh(s: Stack, g: Tensor) -> None:
    """The projectors from g (k, m, n): a singular value decomposition in g's dtype, at least float32.

    Signs are as the decomposition gives them. It raises where g is not finite, and on CUDA it waits for the device to
    know whether it converged.
    """
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    rank = s.states[0]["projector"].shape[0]
    s.keep("projector", vh[:, :rank])
    if "projector_left" in s.states[0]:
        s.keep("projector_left", u[:, :, :rank].mT)


def project(s: Stack, g: Tensor) -> Tensor:
    """G Pᵀ: (k, m, n) -> (k, m, r); with both sides projected (k, r, r)."""
    a = product(g, s.state("projector").mT)
    return product(s.state("projector_left"), a) if "projector_left" in s.states[0] else a


def back(s: Stack, a: Tensor) -> tuple[Tensor, Tensor]:
    """Two factors whose product is a in the original space: (k, m, r) and (k, r, n)."""
    x = product(s.state("projector_left").mT, a) if "projector_left" in s.states[0] else a
    return x, s.state("projector")
