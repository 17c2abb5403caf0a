"""GaLore against its formula; every change has rank r; a full-rank basis gives Adam there."""

import math

import pytest
import torch
from torch import nn

from trainkit.optimizer.galore import GaLore

KNOBS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3, "scale": 0.5, "rank": 2}


def reference(w, gradients, proj_type, gap, *, lr, betas, eps, weight_decay, scale, rank):
    """Per matrix and in its own layout, as the method is written down."""
    m, n = w.shape
    sides = {"std": "right" if m >= n else "left", "reverse_std": "left" if m >= n else "right"}
    side = sides.get(proj_type, proj_type)
    mean = square = 0.0
    for t, g in enumerate(gradients, 1):
        if (t - 1) % gap == 0:
            u, _, vh = torch.linalg.svd(g, full_matrices=False)
            left = u[:, :rank] if side in ("left", "full") else torch.eye(m, dtype=w.dtype)
            right = vh[:rank] if side in ("right", "full") else torch.eye(n, dtype=w.dtype)
        a = left.T @ g @ right.T
        mean = betas[0] * mean + (1 - betas[0]) * a
        square = betas[1] * square + (1 - betas[1]) * a * a
        low = mean / (square.sqrt() + eps)
        kappa = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        w = w - lr * kappa * scale * left @ low @ right
        w = w - lr * weight_decay * w
    return w


@pytest.mark.parametrize("gap", [100, 2])
@pytest.mark.parametrize("shape", [(9, 5), (4, 7), (5, 5)])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_formula(proj_type, shape, gap):
    """With refreshes too: gradients of fixed singular vectors, whose signs the decomposition gives alike."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(5)]
    if gap < 100:
        u, s, vh = torch.linalg.svd(gradients[0], full_matrices=False)
        gradients = [(u * s * scale) @ vh for scale in (1.0, 0.5, 2.0, 0.25, 1.0)]
    expected = reference(w.detach(), gradients, proj_type, gap, **KNOBS)
    optimizer = GaLore([w], **KNOBS, proj_type=proj_type, update_proj_gap=gap)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_changes_have_rank_r(shape):
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = GaLore([w], rank=2)
    for _ in range(3):
        before = w.detach().clone()
        w.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        assert torch.linalg.matrix_rank(w.detach() - before) == 2
    p = optimizer.state[w]["projector"]
    torch.testing.assert_close(p @ p.T, torch.eye(2, dtype=torch.float64))


def test_the_subspace_is_that_of_the_gradient_and_stays_until_the_gap():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(8, 5, dtype=torch.float64))
    optimizer = GaLore([w], rank=2, update_proj_gap=3)
    seen = []
    for _ in range(4):
        w.grad = torch.randn(8, 5, dtype=torch.float64)
        optimizer.step()
        p = optimizer.state[w]["projector"].clone()
        best = torch.linalg.svdvals(w.grad)[:2].norm()
        seen.append((p, torch.isclose((w.grad @ p.T).norm(), best).item()))
    assert [leading for _, leading in seen] == [True, False, False, True]
    assert torch.equal(seen[0][0], seen[2][0])
    assert not torch.equal(seen[2][0], seen[3][0])


def test_full_rank_is_adam_in_a_rotated_basis():
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(7, 4, dtype=torch.float64))
    optimizer = GaLore([w], lr=0.1, rank=4, scale=1.0, eps=0.0)
    gradients = [torch.randn(7, 4, dtype=torch.float64) for _ in range(4)]
    for g in gradients:
        w.grad = g
        optimizer.step()
    p = optimizer.state[w]["projector"]
    turned = nn.Parameter(torch.zeros(7, 4, dtype=torch.float64))
    adam = torch.optim.Adam([turned], lr=0.1, eps=0.0)
    for g in gradients:
        turned.grad = g @ p.T
        adam.step()
    torch.testing.assert_close(w.detach(), turned.detach() @ p, rtol=1e-10, atol=1e-12)
