"""LARS: momentum with a learning rate per layer, and LARC, its clipped form (You et al. 2017, arXiv:1708.03888)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, Tensors, add, run, zeros_like
from trainkit.optimizer.norms import norms


class LARS(MultiTensorOptimizer):
    """d = r (g + λ W), b <- μ b + (1 - dampening) d, W <- W - lr b; nesterov: W <- W - lr (d + μ b).

    r = trust_coeff ‖W‖ / (‖g‖ + λ ‖W‖ + ε), one number per parameter, 1 where ‖W‖ or ‖g‖ is 0; with trust_clip (LARC)
    min(r / lr, 1), so that lr bounds the rate of every layer. b: momentum_buffer, shaped like W; the first one is d.
    Parameters that do not decay (λ = 0) have r = 1, unless always_adapt. Trains convolutional networks with batches of
    thousands. State: 4 bytes per parameter, none with momentum=0.
    As timm's LARS, which multiplies the momentum by the lr of the present step; the paper keeps lr in the momentum,
    which differs while lr changes.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coeff: float = 0.001,
        eps: float = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"optimizer.nesterov needs a momentum and no dampening; got momentum={momentum}, "
                f"dampening={dampening}. Try optimizer.momentum=0.9 optimizer.dampening=0"
            )
        settings = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        settings |= {"nesterov": nesterov, "trust_coeff": trust_coeff, "eps": eps}
        settings |= {"trust_clip": trust_clip, "always_adapt": always_adapt}
        super().__init__(params, settings, maximize=maximize, compile=compile)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros_like(p)} if group["momentum"] else {}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        gain = 1.0 if bucket.step == 1 else 1 - group["dampening"]
        fixed = {"decay": decay, "momentum": group["momentum"], "gain": gain, "nesterov": group["nesterov"]}
        for part in bucket.windows():
            w, g = part.params, part.gradients
            each = {}
            if decay or group["always_adapt"]:
                lengths, slopes = norms(w), norms(g)
                per_length = slopes + decay * lengths + group["eps"]
                ratio = torch.where((lengths > 0) & (slopes > 0), group["trust_coeff"] * lengths / per_length, 1.0)
                if group["trust_clip"]:
                    ratio = (ratio / lr).clamp(max=1.0)
                each["ratio"] = ratio.unbind()
            buffers = [part.state("momentum_buffer")] if group["momentum"] else []
            run(lars, w, g, *buffers, now={"lr": lr}, each=each, compile=group["compile"], **fixed)


def lars(
    w: Tensors,
    g: Tensors,
    b: Tensors | None = None,
    *,
    ratio: Tensors | None = None,
    lr: float,
    decay: float,
    momentum: float,
    gain: float,
    nesterov: bool,
) -> None:
    if b is None:
        add_gradient(w, w, g, ratio, decay, -lr)
        return
    plain = all(t.is_cpu and t.is_contiguous() and t.dtype == torch.float32 for t in (*w, *g, *b))
    if plain and not nesterov and not torch.compiler.is_compiling():
        # torch's fused SGD has b <- μ b + (1 - dampening) (g + λ W); on a processor the ratio is at hand, and in double
        # precision 1 - (1 - ratio) is as good as the ratio's float32.
        decay, ratios = (0.0, [1.0] * len(w)) if ratio is None else (decay, [float(r) for r in ratio])
        options = {"weight_decay": decay, "momentum": momentum, "lr": lr, "nesterov": False, "maximize": False}
        for r, *tensors in zip(ratios, w, g, b, strict=True):
            torch._fused_sgd_(*([t] for t in tensors), dampening=1 - gain * r, is_first_step=False, **options)
        return
    torch._foreach_mul_(b, momentum)
    add_gradient(b, w, g, ratio, decay, gain)
    if nesterov:
        add_gradient(w, w, g, ratio, decay, -lr)
    add(w, b, -lr * momentum if nesterov else -lr)


def add_gradient(
    t: Tensors, w: Tensors, g: Tensors, ratio: Tensors | None, decay: float, factor: float | Tensor
) -> None:
    """t <- t + factor · ratio · (g + decay w), for t that may be w; with ratio=None t <- t + factor · g."""
    if ratio is None:
        add(t, g, factor)
        return
    shares = torch._foreach_mul(ratio, factor)
    if decay:
        torch._foreach_addcmul_(t, w, torch._foreach_mul(shares, decay))
    torch._foreach_addcmul_(t, g, shares)
