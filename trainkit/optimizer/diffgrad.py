"""diffGrad: Adam, held back where the gradient changes little (Dubey et al. 2019, arXiv:1909.11015)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.moments import advance, hf_numbers
from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, Tensors, run, zeros_like


class DiffGrad(MultiTensorOptimizer):
    """W <- W - lr (√bc2 / bc1) ξ m / (√v + ε), with ξ = 1 / (1 + exp(-|g' - g|)), g' the gradient one step earlier.

    m, v: Adam's moments of g, which includes the decay: g = ∇L + λ W; bc = 1 - β^t. g': previous_grad, from 0. ξ is 1/2
    where the gradient stays as it was, and near 1 where it jumps, so entries near an optimum take half of Adam's steps.
    State: 12 bytes per parameter.
    As the authors' second version: in their first one, the published experiments', the earlier gradient could be the
    present one under another name, and then ξ = 1/2 throughout.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings, maximize=maximize, compile=compile)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": zeros_like(p), "exp_avg_sq": zeros_like(p), "previous_grad": zeros_like(p)}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        betas = group["betas"]
        lists = [bucket.state(name) for name in ("exp_avg", "exp_avg_sq", "previous_grad")]
        now = hf_numbers(betas, bucket.step, lr=group["lr"])
        fixed = {"beta1": betas[0], "beta2": betas[1], "eps": group["eps"]}
        fixed |= {"decay": group["weight_decay"], "compile": group["compile"]}
        run(diffgrad, bucket.params, bucket.gradients, *lists, now=now, **fixed)


def diffgrad(
    w: Tensors,
    g: Tensors,
    m: Tensors,
    v: Tensors,
    last: Tensors,
    *,
    decay: float,
    **numbers: Any,
) -> None:
    if decay:
        g = torch._foreach_add(g, w, alpha=decay)
    torch._foreach_sub_(last, g)  # in its place, for want of memory: g' - g, then 1 / ξ
    turn(last)
    if torch.compiler.is_compiling():
        advance(w, g, m, v, divisor=last, **numbers)
    else:
        u = [torch.zeros_like(t) for t in w]
        advance(u, g, m, v, **numbers)
        torch._foreach_addcdiv_(w, u, last)
    torch._foreach_copy_(last, g)


def turn(x: Tensors) -> None:
    """x <- 1 + exp(-|x|)."""
    torch._foreach_abs_(x)
    if x[0].is_cpu or torch.compiler.is_compiling():  # exp2 takes half of exp's time, but has no multi-tensor kernel
        torch._foreach_mul_(x, -1 / math.log(2))
        for t in x:
            exp2_(t)
    else:
        torch._foreach_neg_(x)
        torch._foreach_exp_(x)
    torch._foreach_add_(x, 1.0)


def exp2_(x: Tensor) -> None:
    """x <- 2^x for x up to 0. Compiled for a CPU, of float32 to 2.5e-7 of it down to x = -126, and 2^-126 below:
    torch's own is a call to a library there, which nearly doubles what it adds to a step."""
    if torch.compiler.is_compiling() and x.is_cpu and x.dtype == torch.float32:
        x.copy_(exp2(x))
    else:
        x.exp2_()


def exp2(x: Tensor) -> Tensor:
    """2^x: the nearest whole number is the bits of an exponent, the rest f the series of e^(f ln 2), |f| <= 1/2."""
    x = x.clamp(min=-126.0)  # 2^-126 is the least that has an exponent of its own
    n = x.round()
    f, series = x - n, torch.zeros_like(x)
    for k in reversed(range(7)):
        series = series * f + math.log(2) ** k / math.factorial(k)
    return series * ((n.to(torch.int32) + 127) << 23).view(torch.float32)
