"""Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, descend, run, zeros_like


class Lion(MultiTensorOptimizer):
    """W <- (1 - lr λ) W - lr · sign(β1 m + (1 - β1) g), then m <- β2 m + (1 - β2) g.

    m: exp_avg, shaped like W, from 0; sign(0) = 0. Every entry moves by lr exactly, so lr is 3 to 10 times smaller and
    the decay λ 3 to 10 times larger than AdamW's. State: 4 bytes per parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        super().__init__(
            params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, maximize=maximize, compile=compile
        )

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"exp_avg": zeros_like(p)}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        lists = bucket.params, bucket.gradients, bucket.state("exp_avg")
        fixed = {"beta1": beta1, "beta2": beta2, "decay": group["weight_decay"], "compile": group["compile"]}
        run(lion, *lists, now={"lr": group["lr"]}, **fixed)


def lion(
    w: list[Tensor], g: list[Tensor], m: list[Tensor], *, lr: float, beta1: float, beta2: float, decay: float
) -> None:
    u = torch._foreach_lerp(m, g, 1 - beta1)
    torch._foreach_sign_(u)
    descend(w, u, lr, decay)
    torch._foreach_lerp_(m, g, 1 - beta2)
