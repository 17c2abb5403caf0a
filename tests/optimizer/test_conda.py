"""Conda against its formula, with m kept in the original space; sign descent in the singular basis; Q = I is AdamW."""

import math

import pytest
import torch
from torch import nn

from trainkit.optimizer import conda as module
from trainkit.optimizer.conda import Conda
from trainkit.optimizer.hf_adamw import HFAdamW

KNOBS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "scale": 0.5}


def reference(w, gradients, proj_type, gap, *, lr, betas, eps, weight_decay, scale):
    m, n = w.shape
    sides = {"std": "right" if m >= n else "left", "reverse_std": "left" if m >= n else "right"}
    side = sides.get(proj_type, proj_type)
    mean, square = torch.zeros_like(w), 0.0
    for t, g in enumerate(gradients, 1):
        mean = betas[0] * mean + (1 - betas[0]) * g
        if (t - 1) % gap == 0:
            u, _, vh = torch.linalg.svd(mean, full_matrices=False)
            left = u if side in ("left", "full") else torch.eye(m, dtype=w.dtype)
            right = vh if side in ("right", "full") else torch.eye(n, dtype=w.dtype)
        square = betas[1] * square + (1 - betas[1]) * (left.T @ g @ right.T) ** 2
        low = (left.T @ mean @ right.T) / (square.sqrt() + eps)
        kappa = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        w = w - lr * kappa * scale * left @ low @ right
        w = w - lr * weight_decay * w
    return w


@pytest.mark.parametrize("gap", [100, 2])
@pytest.mark.parametrize("shape", [(9, 5), (4, 7), (5, 5)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_formula(proj_type, shape, gap):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(7)]
    expected = reference(w.detach(), gradients, proj_type, gap, **KNOBS)
    optimizer = Conda([w], **KNOBS, proj_type=proj_type, update_proj_gap=gap)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-11)


def test_the_first_step_is_sign_descent_in_the_singular_basis():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(9, 5, dtype=torch.float64))
    w.grad = torch.randn(9, 5, dtype=torch.float64)
    optimizer = Conda([w], lr=0.1, eps=0.0, scale=0.25)
    optimizer.step()
    q = optimizer.state[w]["projector"]
    torch.testing.assert_close(q @ q.T, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(w.detach(), -0.1 * 0.25 * (w.grad @ q.T).sign() @ q)


def test_scale_is_linear():
    torch.manual_seed(0)
    gradients, reached = [torch.randn(6, 4, dtype=torch.float64) for _ in range(3)], []
    for scale in (0.25, 1.0):
        w = nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
        optimizer = Conda([w], scale=scale)
        for g in gradients:
            w.grad = g
            optimizer.step()
        reached.append(w.detach())
    torch.testing.assert_close(4 * reached[0], reached[1])


def test_with_q_the_identity_it_is_hf_adamw(monkeypatch):
    def identity(s, g):
        s.keep("projector", torch.eye(g.shape[-1], dtype=g.dtype).expand(len(g), -1, -1))

    monkeypatch.setattr(module, "refresh", identity)
    torch.manual_seed(0)
    settings = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.2}
    a, b = (nn.Parameter(torch.ones(4, 6, dtype=torch.float64)) for _ in range(2))
    ours, adam = Conda([a], **settings, scale=1.0, update_proj_gap=2), HFAdamW([b], **settings)
    for _ in range(5):
        a.grad = torch.randn(4, 6, dtype=torch.float64)
        b.grad = a.grad.clone()
        ours.step()
        adam.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
