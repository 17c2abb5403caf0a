"""SinkGD: descent along the gradient scaled to rows and columns of equal norm (Scetbon et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, wide
from trainkit.optimizer.orthogonal import by_shape, matrices, needs_matrices, take


class SinkGD(MultiTensorOptimizer):
    """W <- (1 - lr λ) W - lr α X, X the gradient G after `iterations` times: rows to norm sqrt(n), columns to sqrt(m).

    W, G, X: (m, n) matrices, weights with four axes or more being the matrix (out, the rest); vectors are an error.
    No momentum and no state: 0 bytes per parameter, against AdamW's 8. X = diag(r) G diag(c), so the iteration
    needs only r² = n / (H c²) and c² = m / (Hᵀ r²) with H = G · G entry by entry: products of a matrix with a vector.
    Columns have their norm exactly, rows as the iterations go on; X does not depend on the size of G, and its entries
    have root mean square 1. eps: the least norm that rows of G are divided by at first; rows and columns of
    zeros stay zero also with 0, the value in the equations. The method has no decay: λ is 0.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        alpha: float = 0.05,
        iterations: int = 5,
        weight_decay: float = 0.0,
        *,
        eps: float = 0.0,
        maximize: bool = False,
    ):
        if iterations < 1:
            raise ValueError(f"optimizer.iterations must be at least 1; got {iterations}")
        if not alpha > 0:
            raise ValueError(f"optimizer.alpha must be positive; got {alpha}")
        defaults = {"lr": lr, "alpha": alpha, "iterations": iterations, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, defaults, maximize=maximize)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        needs_matrices(self, self.param_groups[-1]["params"])

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        # On a CPU one matrix at a time, in one and the same memory: H should stay in the cache through all products.
        batches = by_shape(bucket.params, elements=0) if bucket.params[0].is_cpu else by_shape(bucket.params)
        lr, decay = group["lr"] * group["alpha"], group["weight_decay"] / group["alpha"]
        for indices in batches:
            w = [bucket.params[i] for i in indices]
            g = [matrices(bucket.gradients[i]).to(wide(bucket.gradients[i].dtype)) for i in indices]
            x = (g[0].unsqueeze(0) if len(g) == 1 else torch.stack(g)).flatten(0, -3)
            (moves,) = self.temporary([x])
            rows = sinkhorn(x, moves, group["iterations"], group["eps"])
            if len(x) == 1 and w[0].dtype == x.dtype and w[0].is_contiguous():  # a pass less over the matrix
                if decay:
                    w[0].mul_(1 - lr * decay)
                w[0].view(x.shape).addcmul_(moves, rows, value=-lr)
            else:
                take(w, moves.mul_(rows), lr, decay)


def sinkhorn(x: Tensor, out: Tensor, iterations: int, eps: float) -> Tensor:
    """x with every row scaled to norm sqrt(n), then every column to sqrt(m), `iterations` times, as out · rows.

    x, out: (k, m, n), no memory shared; rows, which are returned: (k, m, 1).
    """
    k, m, n = x.shape
    torch.mul(x, x, out=out)
    r, c = out.sum(-1, keepdim=True), x.new_empty(k, n, 1)  # squares of the factors, but for constants
    h, r_, c_ = (out[0], r[0, :, 0], c[0, :, 0]) if k == 1 else (out, r, c)
    product = torch.mv if k == 1 else torch.bmm  # of one matrix, in half the time on a CPU
    # The least sum is so large that its reciprocal is finite: rows of zeros have a finite factor, and stay zeros.
    least = 1e8 * torch.finfo(x.dtype).tiny
    for i in range(iterations):
        if i:
            product(h, c_, out=r_)
        r.clamp_(min=least if i else max(least, eps * eps)).reciprocal_()
        product(h.mT, r_, out=c_).clamp_(min=least).reciprocal_()
    torch.mul(x, c.mul_(m).sqrt_().mT, out=out)  # n from the rows, m / n from the columns
    return r.sqrt_()
