"""LAMB: Adam's step, made as long as the weight in each layer (You et al. 2019, arXiv:1904.00962)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.moments import advance, numbers
from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, Tensors, add, run, zeros_like
from trainkit.optimizer.norms import norm_of_all, norms_of_pieces, ratios, squares


class LAMB(MultiTensorOptimizer):
    """W <- W - lr · r · u, with u = m̂ / (√v̂ + ε) + λ W and r = φ(‖W‖) / ‖u‖, one number per parameter.

    m̂, v̂: Adam's corrected moments of g / max(1, N / max_grad_norm), N the norm of all gradients of all groups; with
    max_grad_norm=None, of g. r = 1 where a norm is 0, and for parameters that do not decay (λ = 0), unless
    always_adapt. φ is the identity; the other settings change this:
      bias_correction=False   the moments are taken as they are
      grad_averaging=False    m <- β1 m + g, instead of β1 m + (1 - β1) g
      trust_clip              r <- min(r, 1)
      caution                 entries of m̂ / (√v̂ + ε) whose sign is not g's are dropped, the others divided by the share
                              of those that stay, at least 0.001 (Liang et al. 2024, arXiv:2411.16085)
      decoupled_decay         λ W is not in u; W <- (1 - lr λ) W before its norm is taken
      corrected_weight_decay  with decoupled_decay: lr² / (the lr given to the constructor) in place of lr in (1 - lr λ)
    Trains with batches of tens of thousands, where one learning rate for all layers fails. State: 8 bytes per
    parameter; beside it, one buffer of 4 bytes per entry of the largest parameter, or of several small ones.
    Defaults and switches are those of timm's LAMB. The paper's form is max_grad_norm=None, always_adapt=True. Unlike
    timm's, each parameter counts its own steps, those without a gradient left out, and gradients are not changed.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        grad_averaging: bool = True,
        max_grad_norm: float | None = 1.0,
        trust_clip: bool = False,
        always_adapt: bool = False,
        caution: bool = False,
        decoupled_decay: bool = False,
        corrected_weight_decay: bool = False,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        settings |= {"bias_correction": bias_correction, "grad_averaging": grad_averaging}
        settings |= {"max_grad_norm": max_grad_norm, "trust_clip": trust_clip, "always_adapt": always_adapt}
        settings |= {"caution": caution, "decoupled_decay": decoupled_decay}
        settings |= {"corrected_weight_decay": corrected_weight_decay}
        super().__init__(params, settings, maximize=maximize, compile=compile)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": zeros_like(p), "exp_avg_sq": zeros_like(p)}

    def update_all(self, found: list[tuple[Bucket, dict[str, Any]]]) -> None:
        clipped = any(group["max_grad_norm"] is not None for _, group in found)
        norm = norm_of_all([g for bucket, _ in found for g in bucket.gradients]) if clipped else None
        for bucket, group in found:
            rates = self.rates(bucket, group, norm)
            for part in bucket.windows():
                self.move(part, group, rates)

    def rates(self, bucket: Bucket, group: dict[str, Any], norm: Tensor | None) -> dict[str, Any]:
        """What the moments of a bucket are moved with; norm: that of all gradients."""
        beta1, beta2 = group["betas"]
        age = bucket.step if group["bias_correction"] else math.inf
        now: dict[str, float | Tensor] = {**numbers(group["betas"], age, lr=1.0)}
        if norm is not None and group["max_grad_norm"] is not None:
            clip = (group["max_grad_norm"] / norm).clamp(max=1.0).to(bucket.params[0].device)
            if not clip.is_cpu or not clip >= 1:  # where nothing waits for the answer, short gradients stay
                now["clip"] = clip
        gain = {} if group["grad_averaging"] else {"gain": 1 / (1 - beta1)}
        return {"now": now, "beta1": beta1, "beta2": beta2, "eps": group["eps"], **gain}

    def move(self, part: Bucket, group: dict[str, Any], rates: dict[str, Any]) -> None:
        w, g, lr, decay = part.params, part.gradients, group["lr"], group["weight_decay"]
        moments = g, part.state("exp_avg"), part.state("exp_avg_sq")
        u = self.temporary(w)
        fast = {"compile": group["compile"]}

        corrected = group["decoupled_decay"] and group["corrected_weight_decay"] and self.defaults["lr"] > 0
        lr_of_decay = lr**2 / self.defaults["lr"] if corrected else lr
        shrink = lr_of_decay * decay if group["decoupled_decay"] else 0.0
        coupled = 0.0 if group["decoupled_decay"] else decay

        if group["caution"]:
            run(direct, u, w, *moments, decay=0.0, **rates, **fast)
            kept = run(agree, u, g, **fast)
            share = [torch.stack(pieces).sum() / max(p.numel(), 1) for p, pieces in zip(w, kept, strict=True)]
            squared = run(combine, u, w, each={"share": share}, decay=coupled, **fast)
        else:
            squared = run(direct, u, w, *moments, decay=coupled, **rates, **fast)

        if decay or group["always_adapt"]:
            of_w, of_u = norms_of_pieces(squared)
            rate = ratios(of_w * abs(1 - shrink) if shrink else of_w, of_u)
            rate = lr * (rate.clamp(max=1.0) if group["trust_clip"] else rate)
        else:
            rate = u[0].new_full((len(w),), lr)
        run(step, w, u, now={"shrink": shrink}, each={"rate": rate.unbind()}, decays=shrink != 0, **fast)


def direct(
    u: Tensors,
    w: Tensors,
    g: Tensors,
    *moments: Tensors,
    decay: float,
    clip: Tensor | None = None,
    **numbers: Any,
) -> list[tuple[Tensor, Tensor]]:
    """u <- -m̂ / (√v̂ + ε) - λ W; returns (‖W‖², ‖u‖²)."""
    torch._foreach_copy_(u, w)
    advance(u, g if clip is None else torch._foreach_mul(g, clip), *moments, scale=-decay, **numbers)
    return list(zip(squares(w), squares(u), strict=True))


def agree(u: Tensors, g: Tensors) -> list[Tensor]:
    """Zeroes the entries of u that do not go against g; returns how many others there are."""
    kept = [(a * b < 0).to(a.dtype) for a, b in zip(u, g, strict=True)]
    torch._foreach_mul_(u, kept)
    return [k.sum() for k in kept]


def combine(u: Tensors, w: Tensors, *, share: Tensors, decay: float) -> list[tuple[Tensor, Tensor]]:
    """u <- u / share - λ W; returns (‖W‖², ‖u‖²)."""
    torch._foreach_div_(u, [s.clamp(min=1e-3) for s in share])
    if decay:
        torch._foreach_add_(u, w, alpha=-decay)
    return list(zip(squares(w), squares(u), strict=True))


def step(w: Tensors, u: Tensors, *, rate: Tensors, shrink: float, decays: bool) -> None:
    """W <- W - shrink W + rate u."""
    if decays:
        add(w, w, -shrink)
    torch._foreach_addcmul_(w, u, rate)
