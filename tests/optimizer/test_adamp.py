"""AdamP and its projection, against the published equations written for one parameter."""

import math

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from trainkit.optimizer.adamp import AdamP


def project(w, g, u, delta, ratio, eps):
    """Π and ρ for one parameter, with host decisions."""
    if w.ndim < 2:
        return u, 1.0
    for view in ((w.shape[0], -1), (1, -1)):
        W, G, U = w.reshape(view), g.reshape(view), u.reshape(view)
        norms = W.norm(dim=1).clamp(min=eps) * G.norm(dim=1).clamp(min=eps)
        if ((W * G).sum(1).abs() / norms).max() < delta / math.sqrt(W.shape[1]):
            unit = W / (W.norm(dim=1, keepdim=True) + eps)
            return (U - unit * (unit * U).sum(1, keepdim=True)).reshape(w.shape), ratio
    return u, 1.0


def equations(lr, betas, eps, decay, delta, ratio, nesterov):
    def formula(t, w, g, kept):
        m = kept["m"] = betas[0] * kept.get("m", 0) + (1 - betas[0]) * g
        v = kept["v"] = betas[1] * kept.get("v", 0) + (1 - betas[1]) * g**2
        n = betas[0] * m + (1 - betas[0]) * g if nesterov else m
        u, rho = project(w, g, n / (v.sqrt() / math.sqrt(1 - betas[1] ** t) + eps), delta, ratio, eps)
        kept["rho"] = torch.tensor(rho)
        return w * (1 - lr * decay * rho) - lr / (1 - betas[0] ** t) * u

    return formula


def orthogonal(w, g, rows):
    """g without what lies along the rows of w, or along all of w."""
    view = (w.shape[0], -1) if rows else (1, -1)
    W, G = w.reshape(view), g.reshape(view)
    return (G - W * (W * G).sum(1, keepdim=True) / (W * W).sum(1, keepdim=True)).reshape(w.shape)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("delta", [0.1, 1.0, 1e9])
def test_the_equations(delta, nesterov):
    settings = {"lr": 0.03, "betas": (0.8, 0.99), "eps": 1e-6}
    toy.follows(
        lambda ps: AdamP(ps, **settings, weight_decay=0.1, delta=delta, wd_ratio=0.5, nesterov=nesterov),
        equations(*settings.values(), 0.1, delta, 0.5, nesterov),
    )


@pytest.mark.parametrize("rows", [True, False])
def test_each_view_fires_where_the_gradient_is_orthogonal(rows):
    """The update then has no part along W, row by row or as a whole, and the decay is ρ λ."""
    p = nn.Parameter(torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    for decay in (0.0, 0.3):
        start = p.detach().clone()
        optimizer = AdamP([p], lr=0.01, weight_decay=decay, wd_ratio=0.25)
        drawn = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        p.grad = orthogonal(start, drawn, rows)
        optimizer.step()
        along = (start * (p.detach() - start)).reshape(6 if rows else 1, -1).sum(1)
        length = start.square().reshape(6 if rows else 1, -1).sum(1)
        torch.testing.assert_close(along, -0.01 * decay * 0.25 * length, rtol=1e-6, atol=1e-8)


def test_one_bad_row_sends_the_decision_to_the_layer():
    w = torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = orthogonal(w, torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), True)
    g[0] += 0.2 * w[0]
    g[1] -= 0.2 * w[1] * w[0].square().sum() / w[1].square().sum()
    p = nn.Parameter(w.clone())
    optimizer = AdamP([p], lr=0.01)
    p.grad = g
    optimizer.step()
    moved = w * (p.detach() - w)
    assert abs(moved.sum()) < 1e-6
    assert moved.sum(1).abs().min() > 1e-3


def adamw(ps, **settings):
    return torch.optim.AdamW(ps, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, **settings)


def test_without_a_limit_it_is_adamw():
    toy.same(lambda ps: AdamP(ps, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, delta=0.0), adamw)


def test_vectors_are_stepped_by_adamw():
    shapes = [(), (1,), (30,)]
    toy.same(lambda ps: AdamP(ps, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1, delta=1e9), adamw, shapes=shapes)


def test_large_parameters_are_decided_whole(monkeypatch):
    """In pieces of few rows: the decision of all of them counts, not of each."""
    monkeypatch.setattr("trainkit.optimizer.multi_tensor.BLOCK", 16)
    monkeypatch.setattr("trainkit.optimizer.multi_tensor.WINDOW", 40)
    test_the_equations(1.0, False)
    test_each_view_fires_where_the_gradient_is_orthogonal(False)


@pytest.mark.parametrize("delta", [pytest.param(1.0, marks=pytest.mark.slow), 1e9])
def test_compiled_it_is_the_same(delta):
    """Some projected as a whole and some not, in several steps; or all row by row."""
    shapes, settings = [(100, 100), (7,)], {"lr": 0.01, "weight_decay": 0.1, "delta": delta}
    toy.same(lambda ps: AdamP(ps, **settings, compile=True), lambda ps: AdamP(ps, **settings), shapes=shapes)


def test_zero_weights_and_gradients():
    p, q = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = AdamP([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.zeros_like(q)
    optimizer.step()
    assert p.isfinite().all()
    assert torch.equal(q, torch.ones(4, 3))


@pytest.mark.parametrize("key", ["delta", "wd_ratio", "eps", "weight_decay"])
def test_negative_settings(key):
    with pytest.raises(ValueError, match=f"optimizer.{key}"):
        AdamP([nn.Parameter(torch.zeros(2))], **{key: -0.1})


def test_it_resumes():
    toy.resumes(lambda ps: AdamP(ps, lr=0.01, delta=1.0))


def test_bytes():
    params = toy.parameters(dtype=torch.float32)
    optimizer = AdamP(params)
    toy.take(optimizer, params, 1)
    assert toy.state_bytes(optimizer) == 8 * sum(p.numel() for p in params)
