"""Trion: orthogonalized momentum in the cosines that it has most of (Modoranu et al. 2025, arXiv:2505.17967)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainkit.optimizer.dct import basis, check_ranking, select, vectors
from trainkit.optimizer.matrices import MatrixOptimizer, Stack, rank_of, sides, zeros
from trainkit.optimizer.orthogonal import MUON, newton_schulz, per_step, shape_scale, working_dtype


class Trion(MatrixOptimizer):
    """B = M + g; J <- the r columns of B Q with the largest l1 norm, C = Q[:, J], b = B C; M <- B - (1 - μ) b Cᵀ,
    W <- (1 - lr λ) W - lr s NS(b) Cᵀ.

    W, g, M: m × n with m >= n; M: momentum_buffer, from 0; Q: the orthogonal n × n cosine transform (dct.py); NS:
    Newton-Schulz with `steps` and `coefficients`, on m × r in place of Muon's m × n. Only what was used decays: the
    rest of the momentum waits until it is large enough to be chosen. Dion with columns chosen instead of iterated for.
    State: 4 bytes per parameter.

    As released, matrices with m < n use the rows of Q: B is transposed, and Q with it. rank: r for all matrices, or a
    share of each one's smaller side. scale: s, "spectral" = sqrt(max(1, m/n)), "match_rms_adamw" = 0.2 sqrt(max(m, n)),
    "ratio" = sqrt(m/n), "none" = 1, of W as it is; the released code's kj, kimi, dion and none. dtype: as in Muon.
    ell_norm: 1 as released, or 2. The released step cannot run (it calls what is not there); the update is its own.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        rank: int | float = 0.25,
        ell_norm: int = 1,
        steps: int = 5,
        coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON,
        eps: float = 1e-7,
        scale: str = "spectral",
        dtype: str = "auto",
        maximize: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rank": rank, "ell_norm": ell_norm}
        defaults |= {"steps": steps, "coefficients": per_step(coefficients, steps), "eps": eps}
        defaults |= {"scale": scale, "dtype": dtype}
        super().__init__(params, defaults, maximize=maximize)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check_ranking(group)
        for p in group["params"]:  # raise for names that are none
            shape_scale(group["scale"], *sides(p))
            working_dtype(group["dtype"], p)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros(p, *p.shape)}

    def advance(self, s: Stack, group: dict[str, Any]) -> None:
        rank, (m, n) = rank_of(s.params[0], group), sides(s.params[0])
        rows = basis("dct2" if s.flip else "dct3", min(m, n), s.gradient.device, s.gradient.dtype)
        momentum = s.seen("momentum_buffer").add_(s.gradient)
        indices, b = select(momentum, rows, rank, group["ell_norm"])
        c = vectors(rows, indices)
        s.keep_seen("momentum_buffer", momentum.baddbmm_(b, c, alpha=group["momentum"] - 1))
        names = ("steps", "coefficients", "eps")
        dtype = working_dtype(group["dtype"], s.params[0])
        o = newton_schulz(b, dtype=dtype, **{name: group[name] for name in names}).to(b.dtype)
        lr, scale = group["lr"], shape_scale(group["scale"], m, n)
        s.add(o, c, alpha=-lr * scale, beta=1 - lr * group["weight_decay"])
