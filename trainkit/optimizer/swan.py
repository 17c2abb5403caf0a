"""SWAN: descent along the normalized and whitened gradient (Ma et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, wide
from trainkit.optimizer.orthogonal import by_shape, matrices, needs_matrices, newton_schulz, take, working_dtype

FORMS = ("swan", "multinorm")
WHITENINGS = ("newton_schulz", "exact")


class SWAN(MultiTensorOptimizer):
    """W <- (1 - lr λ) W - lr Z, Z from the gradient G of the same step alone. State: 0 bytes per parameter.

    form "swan": X = each row of G less its mean, over its standard deviation; Z = (X Xᵀ)^(-1/2) X, scaled back to the
    norm of X (rescale). "multinorm" (one pass of Scetbon et al. 2025): X = each row to norm sqrt(n), not centred;
    Z = sqrt(n) (X Xᵀ)^(-1/2) X. W, G: (m, n) with m <= n; where m > n, the same of the transposed matrix. Weights with
    four axes or more are the matrix (out, the rest); vectors are an error. Rows that do not vary stay 0. Entries of Z
    have root mean square 1, so lr is like Adam's. The method has no decay: λ is 0. Under "swan" the rows of Z sum to 0,
    so the sum of a row of W (of a column, where m > n) is never trained; "multinorm" has no such limit.

    whitening: "exact" is the polar factor by a singular value decomposition, singular values within rounding of 0 (one
    of a centred square matrix always is) being left out. "newton_schulz", the default, since a decomposition takes
    many times as long and makes an accelerator wait: X / ‖X‖, then `steps` times Y <- β (3 I - Y Yᵀ) Y, which equals
    the published iteration on Y Yᵀ and its inverse root; singular values that it does not bring to 1 (those below
    (3 β)^-steps of ‖X‖) stay smaller. dtype: of that iteration, as in Muon.
    The published texts do not settle β and steps; 1/2 is the convergent choice.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        form: str = "swan",
        whitening: str = "newton_schulz",
        steps: int = 10,
        beta: float = 0.5,
        rescale: bool = True,
        dtype: str = "auto",
        maximize: bool = False,
    ):
        if form not in FORMS:
            raise ValueError(f"optimizer.form is one of {', '.join(FORMS)}; got {form!r}")
        if whitening not in WHITENINGS:
            raise ValueError(f"optimizer.whitening is one of {', '.join(WHITENINGS)}; got {whitening!r}")
        if steps < 1:
            raise ValueError(f"optimizer.steps must be at least 1; got {steps}")
        if not 0 < beta < 1:
            raise ValueError(f"optimizer.beta must lie in (0, 1); got {beta}")
        working_dtype(dtype, torch.empty(0))
        defaults = {"lr": lr, "weight_decay": weight_decay, "form": form, "whitening": whitening, "steps": steps}
        defaults |= {"beta": beta, "rescale": rescale, "dtype": dtype}
        super().__init__(params, defaults, maximize=maximize)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        needs_matrices(self, self.param_groups[-1]["params"])

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        for indices in by_shape(bucket.params):
            w = [bucket.params[i] for i in indices]
            g = torch.stack([matrices(bucket.gradients[i]).to(wide(w[0].dtype)) for i in indices])
            x = normalize(g, centred=group["form"] == "swan")
            if group["whitening"] == "exact":
                z = polar(x)
            else:
                beta, dtype = group["beta"], working_dtype(group["dtype"], w[0])
                z = newton_schulz(x, steps=group["steps"], coefficients=(3 * beta, -beta, 0.0), dtype=dtype).type_as(x)
            if group["form"] == "multinorm":
                z = z * math.sqrt(max(x.shape[-2:]))
            elif group["rescale"]:
                z = z * (norms(x) / norms(z).clamp_(min=torch.finfo(z.dtype).tiny))
            take(w, z, group["lr"], group["weight_decay"])


def normalize(x: Tensor, *, centred: bool) -> Tensor:
    """Every line along the longer side to root mean square 1, and, if centred, to mean 0 before. x: (..., m, n)."""
    m, n = x.shape[-2:]
    axis = -2 if m > n else -1
    before = torch.linalg.vector_norm(x, dim=axis, keepdim=True)
    if centred:
        x = x - x.mean(axis, keepdim=True)
    norm = torch.linalg.vector_norm(x, dim=axis, keepdim=True) if centred else before
    varies = norm > before * (16 * torch.finfo(x.dtype).eps if centred else 0.0)  # else it is rounding, or 0
    return x * torch.where(varies, math.sqrt(x.shape[axis]) / norm, 0.0)


def polar(x: Tensor) -> Tensor:
    """U Vᵀ of x = U S Vᵀ over the singular values that are not 0."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    kept = s > s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    return (u * kept.unsqueeze(-2)) @ vt


def norms(x: Tensor) -> Tensor:
    """Frobenius norms of matrices: (..., 1, 1)."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
