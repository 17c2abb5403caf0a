"""The cross-entropy of next tokens from the features before the head; large vocabularies in pieces.

Why not torch's own `linear_cross_entropy`, which also goes by pieces (2.13; 2.11 has none): it ignores autocast, so
that under it everything would be computed in float32, and with features in bfloat16 its loss is rounded to bfloat16,
three digits. In float32 the two agree and cost the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Logits that are held at once: on a GPU enough rows to keep it busy, on a CPU what its caches share out.
PIECE = {"cpu": 2**23, "cuda": 2**27}


def large(rows: int, vocab: int, features: Tensor) -> bool:
    """Whether so many logits are more than two pieces. Not in float16, where the pieces' gradients, made before the
    loss is scaled, would be rounded to 0."""
    dtype = products(features)
    return dtype != torch.float16 and rows * vocab > 2 * PIECE.get(features.device.type, PIECE["cpu"])


@contextmanager
def pieces_as_on(kind: str) -> Iterator[None]:
    """While open, the logits on a CPU are made in the pieces of another kind of device; for planning."""
    before = PIECE["cpu"]
    PIECE["cpu"] = PIECE[kind]
    try:
        yield
    finally:
        PIECE["cpu"] = before


def products(features: Tensor) -> torch.dtype:
    """What a matrix product with these features is computed in: autocast's dtype where it is on, else their own."""
    device = features.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else features.dtype


def loss_by_pieces(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """mean over tokens of logsumexp(W h) - (W h)[target], 0-d, in at least float32.

    features h: (…, width); weight W: (vocab, width); targets: (…), int64. The logits are made a piece of the tokens at
    a time, and with them both gradients, at no further cost; all of them are never held at once. Under autocast the
    matrix products are in its dtype. There is no second derivative.
    """
    rows = features.flatten(0, -2)
    count = max(1, PIECE.get(rows.device.type, PIECE["cpu"]) // weight.shape[0])
    loss: Tensor = ByPieces.apply(rows, weight, targets.flatten(), count, torch.is_grad_enabled())  # type: ignore[assignment]
    return loss


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The same from the logits (…, vocab)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), targets.flatten())


class ByPieces(torch.autograd.Function):
    """The same with the logits of `count` rows at a time, and the gradients made on the way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, labels: Tensor, count: int, training: bool) -> Tensor:  # type: ignore[override]
        device = rows.device.type
        dtype = products(rows)
        wide = torch.promote_types(dtype, torch.float32)
        want_rows, want_weight = (training and wanted for wanted in ctx.needs_input_grad[:2])
        d_rows = torch.empty_like(rows) if want_rows else None
        d_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        loss = torch.zeros((), dtype=wide, device=rows.device)
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            for start in range(0, len(rows), count):
                x, y = rows[start : start + count].to(dtype), labels[start : start + count, None]
                logits = (x @ w.T).to(wide)
                normalizer = logits.logsumexp(-1, keepdim=True)
                loss += (normalizer - logits.gather(-1, y)).sum()
                if not (want_rows or want_weight):
                    continue
                gradient = logits.sub_(normalizer).exp_()  # softmax, which the target's 1 is taken off
                gradient.scatter_add_(-1, y, gradient.new_full((), -1.0).expand_as(y))
                gradient = gradient.div_(len(rows)).to(dtype)
                if d_rows is not None:
                    d_rows[start : start + count] = gradient @ w
                if d_weight is not None and dtype == wide:
                    d_weight.addmm_(gradient.T, x)
                elif d_weight is not None:
                    d_weight += gradient.T @ x
        ctx.save_for_backward(d_rows, None if d_weight is None else d_weight.to(weight.dtype))
        return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # In the dtype of each: a float32 factor must not make wide gradients of narrow weights.
        own = (g if g is None else g * gradients[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*own, None, None, None)
