"""Hybrid-AuON: AuON of the orthogonalized momentum (2025, arXiv:2509.24320)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.auon import EPS_BRAKE, check_brake, damped
from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, zeros_like
from trainkit.optimizer.orthogonal import (
    MUON,
    by_shape,
    lookahead,
    matrices,
    newton_schulz,
    per_step,
    take,
    working_dtype,
)


class HybridAuON(MultiTensorOptimizer):
    """W <- (1 - lr λ) W - lr O / R, O = NS((1 - μ) g + μ m), R = sqrt(mean(cosh²(γ O / ‖O‖))), m <- μ m + (1 - μ) g.

    As Muon without a factor for the shape, damped as AuON is; as O has no dominating entries, R is close to 1. NS:
    `steps` Newton-Schulz iterations (the paper's first abstract speaks of one, the released code takes five). Vectors
    are stepped as by AuON. m: momentum_buffer, from 0. State: 4 bytes per parameter.

    conv: "released" orthogonalizes each (kh, kw) slice of a filter bank by itself, as the released code does, "flat"
    the matrix (out, in · kh · kw). Weights with three axes are stacks of matrices. dtype: of the iteration; "parameter"
    is the parameter's own (at least float32), as released; auto, bfloat16, float32 and float64 as in Muon. eps: added
    to ‖O‖ and to the norm that NS divides by.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.24,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        gamma: float = 1.5,
        steps: int = 5,
        coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON,
        eps: float = 1e-7,
        conv: str = "released",
        dtype: str = "parameter",
        maximize: bool = False,
    ):
        check_brake(gamma, eps)
        if conv not in ("released", "flat"):
            raise ValueError(f"optimizer.conv is released or flat; got {conv!r}")
        working_dtype(dtype, torch.empty(0))
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "gamma": gamma, "steps": steps}
        defaults |= {"coefficients": per_step(coefficients, steps), "eps": eps, "conv": conv, "dtype": dtype}
        super().__init__(params, defaults, maximize=maximize)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros_like(p)}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        banks, vectors = bucket.where(lambda p: p.ndim > 1)
        damped(vectors, group)
        buffers = banks.state("momentum_buffer")
        for indices in by_shape(banks.params):
            w, g, m = ([values[i] for i in indices] for values in (banks.params, banks.gradients, buffers))
            u = lookahead(g, m, group["momentum"])
            stack = torch.stack([matrices(t) for t in u] if group["conv"] == "flat" else list(u))
            settings = {name: group[name] for name in ("steps", "coefficients", "eps")}
            o = newton_schulz(stack, dtype=working_dtype(group["dtype"], w[0]), **settings).type_as(stack)
            take(w, damp(o.view(len(w), -1), group["gamma"], group["eps"]), group["lr"], group["weight_decay"])


def damp(u: Tensor, gamma: float, eps: float) -> Tensor:
    """u / R for each row: (k, N)."""
    unit = u * (gamma / (torch.linalg.vector_norm(u, dim=1, keepdim=True) + eps))
    brake = torch.linalg.vector_norm(unit.cosh_(), dim=1, keepdim=True) / math.sqrt(u.shape[1])
    return u / (brake + EPS_BRAKE)
