"""Adam's two moments and the step they give, for rules that may be compiled."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Tensors, add

Numbers = dict[str, float]


def numbers(betas: tuple[float, float], step: float, *, lr: float) -> Numbers:
    """rate and root with which `advance` takes lr · m̂ / (√v̂ + ε), m̂ = m / (1 - β1^t) and v̂ = v / (1 - β2^t).

    step: t; infinity leaves the corrections out.
    """
    return {"rate": lr / (1 - betas[0] ** step), "root": math.sqrt(1 - betas[1] ** step)}


def hf_numbers(betas: tuple[float, float], step: float, *, lr: float) -> Numbers:
    """The same for lr · (√bc2 / bc1) · m / (√v + ε), bc = 1 - β^t: here ε is added to the uncorrected root."""
    return {"rate": lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step), "root": 1.0}


def advance(
    u: Tensors,
    g: Tensors,
    m: Tensors,
    v: Tensors,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    rate: float | Tensor,
    root: float | Tensor,
    scale: float | Tensor = 1.0,
    gain: float = 1.0,
    nesterov: bool = False,
    divisor: Tensors | None = None,
) -> None:
    """m <- β1 m + (1 - β1) gain g, v <- β2 v + (1 - β2) g², then u <- scale · u - rate · n / (√v / root + eps).

    n = m, or with nesterov β1 m + (1 - β1) g; a divisor divides n too, in one division. rate, root and scale may be
    numbers of `now`. One pass of torch's fused kernel where that can do it. The kernel is told that the moments are old
    (β^∞ = 0), as the corrections are in rate and root; it walks the memory of all four lists as it lies, and multiplies
    u by 1 - lr · weight_decay.
    """
    fused = not nesterov and gain == 1 and divisor is None and not torch.compiler.is_compiling()
    if not (fused and all(t.is_contiguous() for t in (*u, *g, *m, *v))):
        torch._foreach_mul_(m, beta1)
        torch._foreach_add_(m, g, alpha=(1 - beta1) * gain)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        length = torch._foreach_sqrt(v)
        torch._foreach_div_(length, root)
        torch._foreach_add_(length, eps)
        if divisor is not None:
            torch._foreach_mul_(length, divisor)
        n = torch._foreach_lerp(m, g, 1 - beta1) if nesterov else m
        torch._foreach_mul_(u, scale)
        add(u, torch._foreach_div(n, length), -rate)
    else:
        lr = rate * root
        settings = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps * root}
        decay = 0.0 if scale == 1 else (1 - scale) / lr
        old = [infinity(u[0].device)] * len(u)
        settings |= {"weight_decay": decay, "amsgrad": False, "maximize": False}
        torch._fused_adamw_(u, g, m, v, [], old, **settings)


@functools.cache
def infinity(device: torch.device) -> Tensor:
    return torch.full((), math.inf, device=device, dtype=torch.float32)
