"""Muon: momentum, orthogonalized by Newton-Schulz iteration (Jordan 2024, KellerJordan/Muon; torch.optim.Muon)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, zeros_like
from trainkit.optimizer.orthogonal import (
    MUON,
    by_shape,
    lookahead,
    matrices,
    needs_matrices,
    newton_schulz,
    per_step,
    shape_scale,
    take,
    working_dtype,
)


class Muon(MultiTensorOptimizer):
    """W <- (1 - lr λ) W - lr s NS(u), m <- μ m + (1 - μ) g, u = (1 - μ) g + μ m (u = m without nesterov).

    W: (m, n) matrices; weights with four axes or more are the matrix (out, the rest), those with three a stack of
    matrices; with fewer, ValueError. m: momentum_buffer, from 0. NS: Newton-Schulz with `steps` and `coefficients`,
    so every singular value of the update is about 1 and no direction of a matrix is starved. Costs `steps` times three
    products of matrices. State: 4 bytes per parameter.

    The defaults are those of KellerJordan/Muon; torch.optim.Muon is lr=1e-3, weight_decay=0.1, normalize=clamp (the
    norm is max(‖u‖, eps) instead of ‖u‖ + eps). scale: s, "spectral" = sqrt(max(1, m/n)), "match_rms_adamw" =
    0.2 sqrt(max(m, n)), which goes with AdamW's learning rates, "ratio" = sqrt(m/n), "none" = 1. conv_scale: the m and
    n of a convolution's scale, "released" the last two sizes as in the released code (so 1 for square kernels), "flat"
    those of its matrix. dtype: of the iteration, "auto" = bfloat16 as released where the hardware is fast at it, else
    the parameter's own (at least float32), which is more exact and, there, also faster; or parameter, bfloat16,
    float32, float64.
    Unlike the released code, a parameter without a gradient stays where it is (there, a zero gradient is assumed, so
    momentum moves it on), and gradients are not overwritten.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = True,
        steps: int = 5,
        coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON,
        eps: float = 1e-7,
        normalize: str = "add",
        scale: str = "spectral",
        conv_scale: str = "released",
        dtype: str = "auto",
        maximize: bool = False,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov, "steps": steps}
        defaults |= {"coefficients": per_step(coefficients, steps), "eps": eps, "normalize": normalize}
        defaults |= {"scale": scale, "conv_scale": conv_scale, "dtype": dtype}
        if normalize not in ("add", "clamp"):
            raise ValueError(f"optimizer.normalize is add or clamp; got {normalize!r}")
        if conv_scale not in ("released", "flat"):
            raise ValueError(f"optimizer.conv_scale is released or flat; got {conv_scale!r}")
        shape_scale(scale, 1, 1)
        working_dtype(dtype, torch.empty(0))
        super().__init__(params, defaults, maximize=maximize)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros_like(p)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        needs_matrices(self, self.param_groups[-1]["params"])

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        buffers = bucket.state("momentum_buffer")
        for indices in by_shape(bucket.params):
            w, g, m = ([values[i] for i in indices] for values in (bucket.params, bucket.gradients, buffers))
            u = lookahead(g, m, group["momentum"], nesterov=group["nesterov"])
            stack = torch.stack([matrices(t) for t in u])
            dtype = working_dtype(group["dtype"], w[0])
            names = ("steps", "coefficients", "eps", "normalize")
            o = newton_schulz(stack, dtype=dtype, **{name: group[name] for name in names}).to(stack.dtype)
            sizes = o.shape[-2:] if group["conv_scale"] == "flat" else w[0].shape[-2:]
            scale = shape_scale(group["scale"], *sizes)
            take(w, o, group["lr"] * scale, group["weight_decay"] / scale)
