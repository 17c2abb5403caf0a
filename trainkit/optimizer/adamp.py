"""AdamP: Adam without the radial part of its steps, for scale-invariant weights (Heo et al. 2021, arXiv:2006.08217)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer import radial
from trainkit.optimizer.moments import advance, numbers
from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, Tensors, run, zeros_like


class AdamP(MultiTensorOptimizer):
    """W <- (1 - lr λ ρ) W - lr · Π(m̂ / (√v̂ + ε)), m̂ and v̂ being Adam's corrected moments; nesterov: β1 m + (1 - β1) g.

    Π takes the part along W out of the update where W and its gradient are orthogonal up to δ / √d, row by row or as a
    whole (`trainkit.optimizer.radial`); there ρ = wd_ratio, elsewhere Π changes nothing and ρ = 1. Parameters with one
    axis are stepped by AdamW. Keeps momentum from growing the length of weights that a normalization makes
    scale-invariant, and with it from shrinking their effective learning rate. State: 8 bytes per parameter;
    beside it, one buffer of 4 bytes per entry of the largest parameter, or of several small ones.
    As the authors' code, except that the projected step and the decay reach W in one addition.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings |= {"delta": delta, "wd_ratio": wd_ratio, "nesterov": nesterov}
        super().__init__(params, settings, maximize=maximize, compile=compile)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": zeros_like(p), "exp_avg_sq": zeros_like(p)}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        lr, decay, betas = group["lr"], group["weight_decay"], group["betas"]
        now = numbers(betas, bucket.step, lr=lr)
        fixed = {"beta1": betas[0], "beta2": betas[1], "eps": group["eps"]}
        fixed |= {"nesterov": group["nesterov"], "compile": group["compile"]}
        look_at = {"delta": group["delta"], "eps": group["eps"], "compile": group["compile"]}

        def adamw(part: Bucket) -> None:
            run(advance, part.params, *moments(part), now={**now, "scale": 1 - lr * decay}, **fixed)

        matrices, others = bucket.where(lambda p: p.ndim > 1 and p.numel() > 0)
        for kept, part, found in radial.divided(matrices, **look_at):
            adamw(kept)
            if not found:
                continue
            u = self.temporary(part.params)
            pieces = run(look, u, part.params, *moments(part), now=now, rows=True, **fixed)
            dots = [torch.cat(p) for p in pieces]
            q, rho = radial.projections(found, dots, eps=group["eps"], ratio=group["wd_ratio"])
            share = torch._foreach_add(q, torch._foreach_mul(rho, lr * decay)) if decay else q
            run(shorten, part.params, u, share, rows=True, compile=group["compile"])
        adamw(others)


def moments(part: Bucket) -> tuple[Tensors, Tensors, Tensors]:
    """Gradients, first and second moments."""
    return part.gradients, part.state("exp_avg"), part.state("exp_avg_sq")


def look(u: Tensors, w: Tensors, *moments: Tensors, **numbers: Any) -> list[Tensor]:
    """u <- Adam's step, as it is added; returns ⟨W_i, u_i⟩."""
    if torch.compiler.is_compiling():  # which does not fuse _foreach_zero_
        torch._foreach_copy_(u, [torch.zeros_like(t) for t in u])
    else:
        torch._foreach_zero_(u)
    advance(u, *moments, **numbers)
    return radial.products(w, u)


def shorten(w: Tensors, u: Tensors, share: Tensors) -> None:
    """W <- W - share W + u, share: (rows, 1) or (1, 1)."""
    torch._foreach_addcmul_(w, w, share, value=-1)
    torch._foreach_add_(w, u)
