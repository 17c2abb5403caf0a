"""DCT-AdamW: Adam on the cosines that a gradient has most of (Modoranu et al. 2025, arXiv:2505.17967)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.adam import direction, torch_form
from trainkit.optimizer.dct import BASES, basis, check_ranking, rotated, select, vectors
from trainkit.optimizer.matrices import MatrixOptimizer, Stack, product, rank_of, sides, zeros

LEVELS = 255


class DCTAdamW(MatrixOptimizer):
    """A = g + E; every T steps J <- the r columns of A Q with the largest norm, B = Q[:, J]. Then a = A B,
    E <- A - a Bᵀ, m <- β1 m + (1 - β1) a, v <- β2 v + (1 - β2) a², W <- (1 - lr λ) W - lr (m̂ / (√v̂ + ε)) Bᵀ.

    W, g: m × n with m >= n, others transposed; Q: the orthogonal n × n cosine transform (dct.py), one per size, so that
    a subspace is r numbers and no singular value decomposition is needed; J: indices, in the order of the norms; m, v:
    exp_avg and exp_avg_sq, m × r; hats: divided by 1 - β^t. State: 8 r / min(m, n) bytes per parameter and 8 r bytes of
    indices per matrix; error feedback adds 4 bytes per parameter, quantised 1 and 8 per row.

    rank: r for all matrices, or a share of each one's smaller side. update_proj_gap: T; J is chosen at step 1 and at
    every multiple of T. rotate_subspace: when J changes, a column that stays takes its moments along and new ones start
    from 0, as in the paper; without, the default of the released code, moments stay with their place in the order.
    ell_norm: 1 or 2. use_ef: error feedback E, what the subspace left out so far, else E = 0; q_ef: E in 8 bits, each
    row rounded to 255 steps from its smallest to its largest entry (the released code has 15, which wastes four of the
    bits). transform: columns of "dct3", Q as above (released as matmul), or of "dct2", its transpose, whose columns are
    frequencies (released as makhoul).

    Unlike the released code: one Q per size (there, one per optimizer, so that matrices of another size fail); the
    rotation is exact and through a temporary (there, onto its own input); gradients are not overwritten. What has a
    side of 32000 and more, there stepped by AdamW inside, has a role of its own here (embed, head).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rank: int | float = 0.25,
        update_proj_gap: int = 1,
        rotate_subspace: bool = True,
        ell_norm: int = 1,
        use_ef: bool = False,
        q_ef: bool = False,
        transform: str = "dct3",
        maximize: bool = False,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rank": rank}
        defaults |= {"update_proj_gap": update_proj_gap, "rotate_subspace": rotate_subspace, "ell_norm": ell_norm}
        defaults |= {"use_ef": use_ef, "q_ef": q_ef, "transform": transform}
        super().__init__(params, defaults, maximize=maximize)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_ranking(group)
        if group["transform"] not in BASES:
            raise ValueError(f"optimizer.transform is one of {', '.join(BASES)}; got {group['transform']!r}")
        if group["q_ef"] and not group["use_ef"]:
            raise ValueError("optimizer.q_ef is about the error feedback, which is off. Try optimizer.use_ef=true")

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        rank, high = rank_of(p, group), max(sides(p))
        state = {"exp_avg": zeros(p, high, rank), "exp_avg_sq": zeros(p, high, rank)}
        state["indices"] = torch.zeros(rank, dtype=torch.int64, device=p.device)
        if group["q_ef"]:
            state["error"] = torch.zeros(p.shape, dtype=torch.uint8, device=p.device)
            state |= {"error_low": zeros(p, len(p), 1), "error_unit": zeros(p, len(p), 1)}
        elif group["use_ef"]:
            state["error"] = zeros(p, *p.shape)
        return state

    def advance(self, s: Stack, group: dict[str, Any]) -> None:
        a, b = self.low_rank(s, group)
        u = direction(a, s.each("exp_avg"), s.each("exp_avg_sq"), torch_form(group, s.step, 1.0))
        s.add(u, b, alpha=-group["lr"], beta=1 - group["lr"] * group["weight_decay"])

    def low_rank(self, s: Stack, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """a (k, m, r) and Bᵀ (k, r, n); indices, moments and error feedback are moved on."""
        full = error(s).add_(s.gradient) if group["use_ef"] else s.gradient
        rows = basis(group["transform"], full.shape[-1], full.device, full.dtype)
        indices = s.state("indices")
        if s.step == 1 or s.step % group["update_proj_gap"] == 0:
            chosen, a = select(full, rows, indices.shape[-1], group["ell_norm"])
            if s.step > 1 and group["rotate_subspace"]:
                for name in ("exp_avg", "exp_avg_sq"):
                    s.keep(name, rotated(s.state(name), indices, chosen))
            s.keep("indices", chosen)
            b = vectors(rows, chosen)
        else:
            b = vectors(rows, indices)
            a = product(full, b.mT)
        if group["use_ef"]:
            keep_error(s, full.baddbmm_(a, b, alpha=-1))
        return a, b


def error(s: Stack) -> Tensor:
    """E (k, m, n), to be overwritten: of a single matrix in full precision it is the state itself."""
    e = s.seen("error")
    if "error_unit" not in s.states[0]:
        return e
    return e * seen_rows(s, s.state("error_unit")) + seen_rows(s, s.state("error_low"))


def keep_error(s: Stack, e: Tensor) -> None:
    if "error_unit" in s.states[0]:
        rows = seen_rows(s, e)
        low = rows.amin(-1, keepdim=True)  # aminmax takes ten times longer
        unit = rows.amax(-1, keepdim=True).sub_(low).div_(LEVELS)
        s.keep("error_low", low)
        s.keep("error_unit", unit)
        unit = unit.clamp(min=torch.finfo(e.dtype).tiny)  # a row of equal entries
        e = (e - seen_rows(s, low)).div_(seen_rows(s, unit)).round_()
    s.keep_seen("error", e)


def seen_rows(s: Stack, t: Tensor) -> Tensor:
    """Between what is per row of the parameter and what is per row of the matrix as seen."""
    return t.mT if s.flip else t
