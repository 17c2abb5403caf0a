"""SGDP: momentum without the radial part of its steps, for scale-invariant weights (Heo et al. 2021,
arXiv:2006.08217)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer import radial
from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, Tensors, add, run, zeros_like


class SGDP(MultiTensorOptimizer):
    """b <- μ b + (1 - dampening) g, then W <- (1 - lr λ ρ / (1 - μ)) W - lr · Π(b); nesterov: Π(g + μ b).

    b: momentum_buffer, shaped like W, from 0. Π takes the part along W out of the update where W and its gradient are
    orthogonal up to δ / √d, row by row or as a whole (`trainkit.optimizer.radial`); there ρ = wd_ratio, elsewhere Π
    changes nothing and ρ = 1. Parameters with one axis are never projected. Keeps momentum from growing the length of
    weights that a normalization makes scale-invariant. State: 4 bytes per parameter.
    Without nesterov the momentum itself is projected, and stays so, as in the authors' code.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        settings = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        settings |= {"nesterov": nesterov, "eps": eps, "delta": delta, "wd_ratio": wd_ratio}
        super().__init__(params, settings, maximize=maximize, compile=compile)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros_like(p)}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        shrink = lr * group["weight_decay"] / (1 - momentum)
        fixed = {"momentum": momentum, "nesterov": group["nesterov"], "compile": group["compile"]}
        gain = 1 - group["dampening"]
        look_at = {"delta": group["delta"], "eps": group["eps"], "compile": group["compile"]}

        def unprojected(part: Bucket) -> None:
            w, g, b = part.params, part.gradients, part.state("momentum_buffer")
            run(sgd, w, g, b, now={"lr": lr, "shrink": shrink}, gain=gain, **fixed)

        matrices, others = bucket.where(lambda p: p.ndim > 1 and p.numel() > 0)
        for kept, part, found in radial.divided(matrices, **look_at):
            unprojected(kept)
            if not found:
                continue
            w, g, b = part.params, part.gradients, part.state("momentum_buffer")
            pieces = run(look, b, w, g, rows=True, gain=gain, momentum=momentum, compile=group["compile"])
            dots = [torch.cat(p) for p in pieces]
            if group["nesterov"]:  # ⟨W, g + μ b⟩
                dots = [one.dots + momentum * dot for one, dot in zip(found, dots, strict=True)]
            q, rho = radial.projections(found, dots, eps=group["eps"], ratio=group["wd_ratio"])
            onto = torch._foreach_mul(q, -lr if group["nesterov"] else 0.0)
            share = torch._foreach_add(onto, torch._foreach_mul(rho, shrink))
            run(step, w, g, b, q, share, now={"lr": lr}, rows=True, **fixed)
        unprojected(others)


def remember(b: Tensors, g: Tensors, momentum: float, gain: float) -> None:
    torch._foreach_mul_(b, momentum)
    torch._foreach_add_(b, g, alpha=gain)


def look(b: Tensors, w: Tensors, g: Tensors, *, momentum: float, gain: float) -> list[Tensor]:
    """The momentum of this step; returns ⟨W_i, b_i⟩."""
    remember(b, g, momentum, gain)
    return radial.products(w, b)


def step(
    w: Tensors,
    g: Tensors,
    b: Tensors,
    q: Tensors,
    share: Tensors,
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """W <- W - share W - lr u; q, share: (rows, 1). The projection is in b already, or with nesterov in share."""
    if not nesterov:
        torch._foreach_addcmul_(b, w, q, value=-1)
    torch._foreach_addcmul_(w, w, share, value=-1)
    add(w, b, -lr * momentum if nesterov else -lr)
    if nesterov:
        add(w, g, -lr)


def sgd(
    w: Tensors,
    g: Tensors,
    b: Tensors,
    *,
    lr: float,
    shrink: float,
    momentum: float,
    gain: float,
    nesterov: bool,
) -> None:
    add(w, w, -shrink)
    if momentum and not torch.compiler.is_compiling() and all(t.is_contiguous() for t in (*w, *g, *b)):
        # The kernel walks the memory of all three lists as it lies.
        options = {"momentum": momentum, "dampening": 1 - gain, "nesterov": nesterov, "lr": lr, "weight_decay": 0.0}
        torch._fused_sgd_(w, g, b, **options, maximize=False, is_first_step=False)
        return
    remember(b, g, momentum, gain)
    add(w, b, -lr * momentum if nesterov else -lr)
    if nesterov:
        add(w, g, -lr)
