"""Fira: GaLore plus what its subspace leaves out, scaled row by row (Chen et al. 2024, arXiv:2410.01623)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.adam import correction, direction, hf_form
from trainkit.optimizer.matrices import Stack, rank_of, zeros
from trainkit.optimizer.subspace import SubspaceOptimizer, project, refresh

GROWTH = 1.01  # the norm-growth limiter's γ
TINY = 1e-8


class Fira(SubspaceOptimizer):
    """As GaLore P, a = g Pᵀ, m, v and N = m / (√v + ε); then, row by row,
    φ = ‖N‖ / (‖a‖ + 1e-8), S = φ (g - α a P), S <- S / l with l = max(‖S‖ / (n + 1e-8), γ) / γ, n <- ‖S‖, γ = 1.01,
    W <- (1 - lr λ) (W - lr (√bc2 / bc1) (α N P + S)).

    W, g, S: m × n with m >= n, others transposed (proj_type, see SubspaceOptimizer); P: projector, r × n; m, v: exp_avg
    and exp_avg_sq, m × r; n: residual_norm, a number per matrix; at the first step l = 1. The update has full rank.
    State: 8 r / min(m, n) + 4 r / max(m, n) bytes per parameter, and 4 per matrix.

    As released, α also multiplies what is taken off g, so that with α = 0.25 the residual keeps three quarters of the
    gradient in the subspace, while S itself is not scaled; α = 1 is the paper's formula. S is never formed: its norm
    follows from those of g's and a's rows, and φ commutes with P, so no product of matrices is added to GaLore's two.
    proj_type "full" has no rows to scale and is refused. rank: as in GaLore.
    """

    types = ("std", "reverse_std", "left", "right")

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
        alpha: float = 0.25,
        proj_type: str = "std",
        maximize: bool = False,
    ):
        adam = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        subspace = {"rank": rank, "update_proj_gap": update_proj_gap, "alpha": alpha, "proj_type": proj_type}
        super().__init__(params, {**adam, **subspace}, maximize=maximize)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        rank, rows = rank_of(p, group), self.oriented(p, group)[0]
        moments = {"exp_avg": zeros(p, rows, rank), "exp_avg_sq": zeros(p, rows, rank)}
        return {**moments, **self.projectors(p, group, rank), "residual_norm": zeros(p)}

    def advance(self, s: Stack, group: dict[str, Any]) -> None:
        alpha, bias = group["alpha"], correction(group, s.step)
        if (s.step - 1) % group["update_proj_gap"] == 0:
            refresh(s, s.gradient)
        a = project(s, s.gradient)
        u = direction(a, s.each("exp_avg"), s.each("exp_avg_sq"), hf_form(group, s.step, 1.0))  # bias · N
        inside = squares(a)
        phi = squares(u).sqrt_() / inside.sqrt().add_(TINY)  # (k, m), bias · φ
        # P has orthonormal rows, so ‖g - α a P‖² = ‖g‖² - (2 α - α²) ‖a‖², row by row.
        outside = squares(s.gradient).sub_(inside, alpha=(2 - alpha) * alpha).clamp_(min=0)
        norm = (phi.square() * outside).sum(-1).sqrt_() / bias  # (k,)
        if s.step > 1:
            limit = (norm / (s.state("residual_norm") + TINY)).clamp_(min=GROWTH) / GROWTH
            norm, phi = norm / limit, phi / limit[:, None]
        s.keep("residual_norm", norm)
        kept = 1 - group["lr"] * group["weight_decay"]
        rows = phi[:, :, None]
        x = torch.addcmul(u, a, rows, value=-1).mul_(alpha)
        s.add(x, s.state("projector"), alpha=-group["lr"] * kept, beta=kept, rows=rows)


def squares(t: Tensor) -> Tensor:
    """Squared lengths of the rows: (k, m, n) -> (k, m). vector_norm takes ten times longer on transposed matrices."""
    return torch.linalg.vecdot(t, t)
