"""AuON: momentum damped by the root mean square of a hyperbolic cosine (2025, arXiv:2509.24320)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, descend, run, zeros_like
from trainkit.optimizer.orthogonal import lookahead, shape_scale

EPS_BRAKE = 1e-8  # added to R; the released code and the paper have no name for it


class AuON(MultiTensorOptimizer):
    """W <- (1 - lr λ) W - lr u / R, R = sqrt(mean(cosh²(γ u / ‖u‖))), m <- μ m + (1 - μ) g, u = (1 - μ) g + μ m.

    m: momentum_buffer, from 0; u, W: one shape, any; the mean is over all N entries of one parameter. R lies in
    [1, cosh γ], near sqrt(1 + γ²/N) unless few entries dominate: then the step is held back. Linear in the number of
    entries, no products of matrices. State: 4 bytes per parameter.

    form "released": as above, after the authors' code. u keeps its length there, so this is close to SGD with momentum
    and its lr depends on the size of the gradients. "paper": lr sqrt(max(1, m/n)) Ĝ / R with Ĝ = u / ‖u‖ and R of
    γ Ĝ, as in the first version of the paper (which has γ = 1), so every step has about the length
    lr sqrt(max(1, m/n)); m and n: the last two axes, 1 for vectors. The released code is the default because it is
    what the authors' results were obtained with. eps: added to ‖u‖.
    Unlike there, the weight decay of single parameters is a matter of parameter groups, not of an attribute.
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
        eps: float = 1e-7,
        form: str = "released",
        maximize: bool = False,
    ):
        check_brake(gamma, eps)
        if form not in ("released", "paper"):
            raise ValueError(f"optimizer.form is released or paper; got {form!r}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "gamma": gamma, "eps": eps}
        super().__init__(params, {**defaults, "form": form}, maximize=maximize)

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum_buffer": zeros_like(p)}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        damped(bucket, group, paper=group["form"] == "paper")


def damped(bucket: Bucket, group: dict[str, Any], *, paper: bool = False) -> None:
    """Moves the parameters of a bucket. u is not stored: each of the three passes makes it again from m and g."""
    if not bucket.params:
        return
    w, g, m, momentum = (
        bucket.params,
        bucket.gradients,
        bucket.state("momentum_buffer"),
        {"momentum": group["momentum"]},
    )
    norms = run(advance, m, g, **momentum)
    lengths = [pieces[0] if len(pieces) == 1 else torch.linalg.vector_norm(torch.stack(pieces)) for pieces in norms]
    torch._foreach_add_(lengths, group["eps"])
    twice = torch._foreach_reciprocal(lengths)
    torch._foreach_mul_(twice, 2 * group["gamma"])
    sums = run(cosh_sums, m, g, each={"twice": twice}, **momentum)
    brakes = [pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum() for pieces in sums]
    torch._foreach_div_(brakes, [float(p.numel()) for p in w])
    torch._foreach_sqrt_(brakes)
    torch._foreach_add_(brakes, EPS_BRAKE)
    if paper:
        sizes = [p.shape[-2:] if p.ndim > 1 else (1, 1) for p in w]
        torch._foreach_mul_(brakes, lengths)
        torch._foreach_div_(brakes, [shape_scale("spectral", *size) for size in sizes])
    torch._foreach_reciprocal_(brakes)
    fixed = {**momentum, "decay": group["weight_decay"]}
    run(move, w, g, m, now={"lr": group["lr"]}, each={"factors": brakes}, **fixed)


def advance(m: list[Tensor], g: list[Tensor], *, momentum: float) -> Sequence[Tensor]:
    """The new momentum; the norms of u."""
    return torch._foreach_norm(lookahead(g, m, momentum))


def cosh_sums(m: list[Tensor], g: list[Tensor], *, twice: list[Tensor], momentum: float) -> list[Tensor]:
    """The sums of cosh(x)² = 1/2 + (exp(2x) + exp(-2x)) / 4, which takes half the time of a cosh; 2x = twice u."""
    u = torch._foreach_lerp(g, m, momentum)
    torch._foreach_mul_(u, twice)
    torch._foreach_exp_(u)
    sums = [t.sum() for t in u]
    torch._foreach_reciprocal_(u)
    return [0.5 * t.numel() + 0.25 * (a + t.sum()) for a, t in zip(sums, u, strict=True)]


def move(
    w: list[Tensor],
    g: list[Tensor],
    m: list[Tensor],
    *,
    lr: float,
    factors: list[Tensor],
    momentum: float,
    decay: float,
) -> None:
    u = torch._foreach_lerp(g, m, momentum)
    torch._foreach_mul_(u, factors)
    descend(w, u, lr, decay)


def check_brake(gamma: float, eps: float) -> None:
    if not gamma >= 0:
        raise ValueError(f"optimizer.gamma must not be negative; got {gamma}")
    if not eps > 0:
        raise ValueError(f"optimizer.eps must be positive, as a zero gradient is divided by it; got {eps}")
