"""GaLore: Adam on gradients projected to their leading singular directions (Zhao et al. 2024, arXiv:2403.03507)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trainkit.optimizer.adam import direction, hf_form
from trainkit.optimizer.matrices import Stack, rank_of, zeros
from trainkit.optimizer.subspace import SubspaceOptimizer, back, project, refresh


class GaLore(SubspaceOptimizer):
    """Every T steps P <- the first r rows of Vᵀ in g = U S Vᵀ. Then a = g Pᵀ, m <- β1 m + (1 - β1) a,
    v <- β2 v + (1 - β2) a², W <- (1 - lr λ) (W - lr s (√bc2 / bc1) (m / (√v + ε)) P).

    W, g: m × n with m >= n, others transposed (proj_type "std", see SubspaceOptimizer); P: projector, r × n; m, v:
    exp_avg and exp_avg_sq, m × r, neither rotated nor reset when P changes; bc = 1 - β^t; T: update_proj_gap; s: scale.
    Every change of W between refreshes has rank r or less. State: 8 r / min(m, n) + 4 r / max(m, n) bytes per
    parameter, 2.25 in place of Adam's 8 for r a quarter of a 4:1 matrix.

    rank: r for all matrices, or a share of each one's smaller side: the authors' 128 of 512 to 1024 of 4096 are 0.25.
    A rank beyond a matrix is an error; the released code takes what there is and says nothing. Matrices only, as there.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        rank: int | float = 0.25,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
        maximize: bool = False,
    ):
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        subspace = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
        super().__init__(params, {**adam, **subspace}, maximize=maximize)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        rank = rank_of(p, group)
        rows = rank if group["proj_type"] == "full" else self.oriented(p, group)[0]
        moments = {"exp_avg": zeros(p, rows, rank), "exp_avg_sq": zeros(p, rows, rank)}
        return {**moments, **self.projectors(p, group, rank)}

    def advance(self, s: Stack, group: dict[str, Any]) -> None:
        if (s.step - 1) % group["update_proj_gap"] == 0:
            refresh(s, s.gradient)
        a = project(s, s.gradient)
        u = direction(a, s.each("exp_avg"), s.each("exp_avg_sq"), hf_form(group, s.step, 1.0))
        kept = 1 - group["lr"] * group["weight_decay"]
        s.add(*back(s, u), alpha=-group["lr"] * group["scale"] * kept, beta=kept)
