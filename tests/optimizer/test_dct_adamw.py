"""DCT-AdamW against its formula; the cosine basis and its ranking; error feedback in full and in 8 bits."""

import math

import pytest
import torch
from torch import nn

from trainkit.optimizer.dct import basis, dct, rotated, select
from trainkit.optimizer.dct_adamw import DCTAdamW

CPU, F64 = torch.device("cpu"), torch.float64
KNOBS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3}


def cosines(n):
    q = [[math.sqrt(2 / n) * math.cos(math.pi * i * (2 * j + 1) / (2 * n)) for j in range(n)] for i in range(n)]
    q[0] = [x * math.sqrt(0.5) for x in q[0]]
    return torch.tensor(q, dtype=F64)


def reference(w, gradients, *, rank, gap, rotate, feedback, ell, transform, lr, betas, eps, weight_decay):
    """Per matrix and in its own layout, R as a product of matrices. Yields W and the sorted indices."""
    tall, e, indices = w.shape[0] >= w.shape[1], torch.zeros_like(w), None
    q = cosines(min(w.shape)) if transform == "dct3" else cosines(min(w.shape)).T
    mean = square = torch.zeros((w.shape[0], rank) if tall else (rank, w.shape[1]), dtype=F64)
    for t, g in enumerate(gradients, 1):
        w = w * (1 - lr * weight_decay)
        full = g + e
        old = indices
        if t == 1 or t % gap == 0:
            norms = (full @ q).norm(p=ell, dim=0) if tall else (q.T @ full).norm(p=ell, dim=1)
            indices = norms.argsort(descending=True)[:rank]
            if t > 1 and rotate:
                r = q[:, old].T @ q[:, indices]
                mean, square = (mean @ r, (square @ r).abs()) if tall else (r.T @ mean, (r.T @ square).abs())
        b = q[:, indices]
        a = full @ b if tall else b.T @ full
        if feedback:
            e = full - (a @ b.T if tall else b @ a)
        mean = betas[0] * mean + (1 - betas[0]) * a
        square = betas[1] * square + (1 - betas[1]) * a * a
        u = (mean / (1 - betas[0] ** t)) / ((square / (1 - betas[1] ** t)).sqrt() + eps)
        w = w - lr * (u @ b.T if tall else b @ u)
        yield w, indices


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize(
    ("gap", "rotate", "feedback", "ell", "transform"),
    [
        (1, True, False, 1, "dct3"),
        (1, False, False, 1, "dct3"),
        (2, True, True, 2, "dct3"),
        (3, False, True, 1, "dct2"),
        (100, True, True, 1, "dct3"),
    ],
)
def test_formula(shape, gap, rotate, feedback, ell, transform):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape, dtype=F64))
    gradients = [torch.randn(shape, dtype=F64) for _ in range(6)]
    own = {"rank": 3, "transform": transform}
    expected = reference(w.detach(), gradients, gap=gap, rotate=rotate, feedback=feedback, ell=ell, **own, **KNOBS)
    named = {"update_proj_gap": gap, "rotate_subspace": rotate, "use_ef": feedback, "ell_norm": ell}
    optimizer = DCTAdamW([w], **KNOBS, **own, **named)
    for g, (reached, indices) in zip(gradients, expected, strict=True):
        w.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(w.detach(), reached, rtol=1e-10, atol=1e-12)
        assert torch.equal(optimizer.state[w]["indices"], indices)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 257])
def test_the_basis_is_orthogonal_and_shared(n):
    q = dct(n, CPU, F64)
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(q, cosines(n), rtol=0, atol=1e-12)
    assert dct(n, CPU, F64) is q
    assert torch.equal(basis("dct3", n, CPU, F64), q.T)
    assert dct(n, CPU, torch.float32).dtype == torch.float32


def test_ranking_by_l2_captures_the_most_energy():
    torch.manual_seed(0)
    g = torch.randn(1, 9, 6, dtype=F64)
    rows = basis("dct3", 6, CPU, F64)
    indices, a = select(g, rows, 2, 2)
    torch.testing.assert_close(a[0], g[0] @ rows[indices[0]].T)
    energies = [(g[0] @ rows[[i, j]].T).square().sum() for i in range(6) for j in range(i)]
    torch.testing.assert_close(a.square().sum(), max(energies))


def test_rotation_moves_what_stays_and_clears_what_is_new():
    moments = torch.arange(1.0, 7.0).view(1, 2, 3)  # slots hold the vectors 5, 2, 7
    turned = rotated(moments, torch.tensor([[5, 2, 7]]), torch.tensor([[7, 0, 5]]))
    assert turned.tolist() == [[[3.0, 0.0, 1.0], [6.0, 0.0, 4.0]]]


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_full_rank_is_adamw_in_the_cosine_basis(shape):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape, dtype=F64))
    rows = basis("dct3", 6, CPU, F64)
    turned = nn.Parameter(w.detach() @ rows.T if shape[0] > shape[1] else rows @ w.detach())
    optimizer = DCTAdamW([w], **KNOBS, rank=6, use_ef=True)
    adamw = torch.optim.AdamW([turned], **KNOBS)
    for _ in range(4):
        w.grad = torch.randn(shape, dtype=F64)
        turned.grad = w.grad @ rows.T if shape[0] > shape[1] else rows @ w.grad
        optimizer.step()
        adamw.step()
        assert optimizer.state[w]["error"].abs().max() < 1e-13
    back = turned.detach() @ rows if shape[0] > shape[1] else rows.T @ turned.detach()
    torch.testing.assert_close(w.detach(), back, rtol=1e-10, atol=1e-12)


def test_error_feedback_delivers_everything_in_the_end():
    """What was projected and what is held back add up to all gradients."""
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(9, 6, dtype=F64))
    optimizer, total, delivered = DCTAdamW([w], rank=2, use_ef=True), 0.0, 0.0
    for _ in range(5):
        w.grad = torch.randn(9, 6, dtype=F64)
        held = optimizer.state[w]["error"].clone() if w in optimizer.state else 0.0
        optimizer.step()
        rows = basis("dct3", 6, CPU, F64)[optimizer.state[w]["indices"]]
        total, delivered = total + w.grad, delivered + (w.grad + held) @ rows.T @ rows
    torch.testing.assert_close(delivered + optimizer.state[w]["error"], total)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_eight_bits_are_255_steps_per_row(shape):
    torch.manual_seed(0)
    full, eight = (nn.Parameter(torch.zeros(shape, dtype=F64)) for _ in range(2))
    exact, rounded = DCTAdamW([full], rank=2, use_ef=True), DCTAdamW([eight], rank=2, use_ef=True, q_ef=True)
    full.grad = torch.randn(shape, dtype=F64)
    eight.grad = full.grad.clone()
    exact.step()
    rounded.step()
    e, state = exact.state[full]["error"], rounded.state[eight]
    spread = e.amax(1, keepdim=True) - e.amin(1, keepdim=True)
    kept = state["error"] * state["error_unit"] + state["error_low"]
    assert state["error"].dtype == torch.uint8
    assert ((kept - e).abs() <= spread / 255 / 2 * (1 + 1e-9)).all()
    assert state["error"].amin(1).max() == 0
    assert state["error"].amax(1).min() == 255
    assert torch.equal(full, eight)  # the first step has no error to add
    full.grad, eight.grad = (torch.zeros(shape, dtype=F64) for _ in range(2))
    exact.step()
    rounded.step()
    assert torch.equal(exact.state[full]["indices"], state["indices"])
    torch.testing.assert_close(eight, full, rtol=0, atol=2e-4)
    assert not torch.equal(full, eight)
