"""A gradient may grow only slowly from step to step: the limiter of Fira (Chen et al. 2024, arXiv:2410.01623)."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.gradient.scale import scale_
from trainkit.measure.gradient_norms import norms


class NormGrowthLimit:
    """g <- g · limit / max(‖g‖ / (n + eps), limit), n the norm that this left in the step before; then n <- ‖g‖.

    So ‖g‖ ≤ limit · (n + eps): a spike is cut to its predecessor's size and a lasting change is followed at
    limit - 1 per step. Gradients that shrink, and the first, stay as they are. of="model": one norm over everything;
    of="tensor": one for each parameter tensor (the paper limits one part of each matrix's update so).
    Unlike the released code, a norm of 0 is no predecessor: it would pin what follows to eps. Nor is a non-finite one,
    which itself stays non-finite. Returns {"grad_norm/limited": the norm of everything afterwards}.
    n is the only state, in `state_dict`.
    """

    def __init__(self, limit: float = 1.01, *, of: str = "model", eps: float = 1e-8):
        if not (limit >= 1 and isfinite(limit)):
            raise ValueError(f"gradient.limit must be at least 1; got {limit}. 1.01 allows 1 % of growth per step")
        if of not in ("model", "tensor"):
            raise ValueError(f"gradient.of is model or tensor; got {of!r}")
        if not eps >= 0:
            raise ValueError(f"gradient.eps must not be negative; got {eps}")
        self.limit, self.of, self.eps = limit, of, eps
        self.last: Tensor | None = None  # (1,) or (tensors,); 0 where there was no gradient yet
        self.parameters: list[nn.Parameter] = []

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        lengths = norms(gradients)
        now = lengths if self.of == "tensor" else torch.linalg.vector_norm(lengths, keepdim=True)
        rows = self._rows(len(gradients))
        if self.last is None:
            count = len(self.parameters) if rows is not None else len(now)
            self.last = now.new_zeros(count)
        self.last = self.last.to(now)
        last = self.last if rows is None else self.last[rows.to(now.device, non_blocking=True)]
        growth = (now / (last + self.eps)).clamp(min=self.limit)
        factors = torch.where(last > 0, self.limit / growth, 1.0)
        scale_(gradients, factors if self.of == "tensor" else factors[0])
        now = now * factors
        kept = torch.where((now > 0) & now.isfinite(), now, last)
        self.last = kept if rows is None else self.last.index_copy(0, rows.to(now.device, non_blocking=True), kept)
        return {"grad_norm/limited": torch.linalg.vector_norm(now)}

    def _rows(self, count: int) -> Tensor | None:
        """Which parameters the gradients at hand belong to; None where that is all of them, or does not matter."""
        if self.of == "model" or len(self.parameters) == count or not self.parameters:
            return None
        return torch.tensor([i for i, p in enumerate(self.parameters) if p.grad is not None])

    def state_dict(self) -> dict[str, Any]:
        return {} if self.last is None else {"last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last = state.get("last")
