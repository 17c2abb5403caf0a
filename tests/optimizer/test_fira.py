"""Fira against its formula, S formed in full; the limiter; nothing left over at full rank."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from trainkit.optimizer.fira import Fira

KNOBS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "rank": 2}


def reference(w, gradients, side, alpha, *, lr, betas, eps, weight_decay, rank):
    """Per matrix and in its own layout; yields W and ‖S‖ after each step."""
    mean, square, last = 0.0, 0.0, None
    for t, g in enumerate(gradients, 1):
        if t == 1:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            left = u[:, :rank] if side == "left" else torch.eye(len(g), dtype=w.dtype)
            right = vh[:rank] if side == "right" else torch.eye(len(g.T), dtype=w.dtype)
        a = left.T @ g @ right.T
        mean = betas[0] * mean + (1 - betas[0]) * a
        square = betas[1] * square + (1 - betas[1]) * a * a
        low = mean / (square.sqrt() + eps)
        axis = 1 if side == "right" else 0
        phi = low.norm(dim=axis, keepdim=True) / (a.norm(dim=axis, keepdim=True) + 1e-8)
        s = (g - alpha * left @ a @ right) * phi
        if last is not None:
            s = s / (max((s.norm() / (last + 1e-8)).item(), 1.01) / 1.01)
        last = s.norm()
        kappa = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        w = w - lr * kappa * (alpha * left @ low @ right + s)
        w = w - lr * weight_decay * w
        yield w, last


@pytest.mark.parametrize("alpha", [1.0, 0.25])
@pytest.mark.parametrize(
    ("shape", "proj_type", "side"),
    [
        ((9, 5), "std", "right"),
        ((4, 7), "std", "left"),
        ((9, 5), "reverse_std", "left"),
        ((4, 7), "right", "right"),
        ((9, 5), "left", "left"),
    ],
)
def test_formula(shape, proj_type, side, alpha):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    gradients = [torch.randn(shape, dtype=torch.float64) * 1.5**t for t in range(5)]
    expected = reference(w.detach(), gradients, side, alpha, **KNOBS)
    optimizer = Fira([w], **KNOBS, alpha=alpha, proj_type=proj_type)
    for g, (reached, norm) in zip(gradients, expected, strict=True):
        w.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(w.detach(), reached, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(optimizer.state[w]["residual_norm"], norm, rtol=1e-10, atol=0)


def test_the_residual_grows_by_one_percent_at_most():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(9, 5))
    optimizer = Fira([w], rank=2, update_proj_gap=4)
    norms = []
    for t in range(12):
        w.grad = torch.randn(9, 5) * 3.0**t
        optimizer.step()
        norms.append(optimizer.state[w]["residual_norm"].item())
    growth = [now / before for before, now in pairwise(norms)]
    assert max(growth) == pytest.approx(1.01, abs=1e-4)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_full_rank_leaves_nothing_over(shape):
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = Fira([w], rank=5, alpha=1.0)
    w.grad = torch.randn(shape, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[w]["residual_norm"] < 1e-6
    p = optimizer.state[w]["projector"]
    low = w.detach() @ p.T if shape[0] > shape[1] else w.detach().T @ p.T
    torch.testing.assert_close(low.abs(), torch.full_like(low, 1e-3), rtol=1e-2, atol=0)  # Adam's first step


def test_the_update_has_full_rank():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(9, 5, dtype=torch.float64))
    optimizer = Fira([w], rank=1)
    w.grad = torch.randn(9, 5, dtype=torch.float64)
    optimizer.step()
    assert torch.linalg.matrix_rank(w.detach()) == 5
