"""Adam's moments and its direction, in one pass of torch's fused kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Numbers = dict[str, float]


def torch_form(group: dict[str, Any], step: int, lr: float, decay: float = 0.0) -> Numbers:
    """The kernel's numbers for W <- (1 - lr λ) W - lr m̂ / (√v̂ + ε), with m̂ = m / bc1, v̂ = v / bc2."""
    beta1, beta2 = group["betas"]
    return {"step": step, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": group["eps"], "decay": decay}


def hf_form(group: dict[str, Any], step: int, lr: float, decay: float = 0.0) -> Numbers:
    """The kernel's numbers for W <- (1 - lr λ) (W - lr κ m / (√v + ε)), with κ = correction(group, step).

    ε is added to the uncorrected root, so it is divided by √bc2 for the kernel; the decay comes last, so it shortens
    the step as well.
    """
    numbers = torch_form(group, step, lr, decay)
    if not group["correct_bias"]:
        numbers["step"] = math.inf  # β^∞ = 0: the kernel divides by 1
    numbers["eps"] /= math.sqrt(1 - group["betas"][1] ** numbers["step"])
    if decay:
        numbers["lr"] = lr * (1 - lr * decay)
        numbers["decay"] = decay / (1 - lr * decay)
    return numbers


def correction(group: dict[str, Any], step: int) -> float:
    """κ = √bc2 / bc1 of the moments after `step` steps, bc = 1 - β^step; 1 without bias correction."""
    beta1, beta2 = group["betas"]
    return math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["correct_bias"] else 1.0


def adam_(
    w: Sequence[Tensor],
    g: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """m <- β1 m + (1 - β1) g, v <- β2 v + (1 - β2) g², and W moves; all of one dtype, at least float32.

    The kernel walks the memory of all four as it lies, so what is not contiguous goes through copies.
    """
    lists = [list(w), list(g), list(m), list(v)]
    dense = [[t.contiguous() for t in values] for values in lists]
    steps = [torch.full((), step, dtype=torch.float32, device=w[0].device)] * len(w)
    torch._fused_adamw_(
        *dense,
        [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    for kept, values in zip(lists, dense, strict=True):
        for t, moved in zip(kept, values, strict=True):
            if moved is not t:
                t.copy_(moved)


def direction(a: Tensor, m: Sequence[Tensor], v: Sequence[Tensor], numbers: Numbers) -> Tensor:
    """What Adam would subtract at lr = 1, for gradients a: (count, ...); the moments m, v: one tensor each, move."""
    u = torch.zeros_like(a)
    adam_(u.unbind(), a.unbind(), m, v, **{**numbers, "lr": -1.0, "decay": 0.0})  # -lr: the direction as it is
    return u
