"""HFAdamW: eps on the uncorrected root, decay last."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from trainkit.optimizer.hf_adamw import HFAdamW

SETTINGS = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.3}


def expected(w, gradients, *, lr, betas, eps, weight_decay, correct_bias=True):
    m = v = torch.zeros_like(w)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        kappa = math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if correct_bias else 1.0
        w = w - lr * kappa * m / (v.sqrt() + eps)
        w = w - lr * weight_decay * w
    return w


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_formula(correct_bias, dtype):
    """In half precision a step is the float32 step of the same state, rounded once."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(7,), (4, 3), ()]]
    start = [p.detach().clone().double() for p in params]
    optimizer = HFAdamW(params, **SETTINGS, correct_bias=correct_bias)
    gradients = [[torch.randn(p.shape).to(dtype) for p in params] for _ in range(6 if dtype == torch.float64 else 1)]
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for i, p in enumerate(params):
        reached = expected(start[i], [step[i].double() for step in gradients], **SETTINGS, correct_bias=correct_bias)
        if dtype == torch.float64:
            torch.testing.assert_close(p, nn.Parameter(reached), rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(p, reached.float().to(dtype))
            assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


def test_without_decay_and_eps_it_is_adam():
    a, b = (nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64)) for _ in range(2))
    ours, adam = HFAdamW([a], lr=0.1, eps=0.0), torch.optim.Adam([b], lr=0.1, eps=0.0)
    for step in range(5):
        a.grad = torch.cos(torch.arange(9.0, dtype=torch.float64) + step)
        b.grad = a.grad.clone()
        ours.step()
        adam.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_tensors_that_do_not_lie_contiguous():
    torch.manual_seed(0)
    base = torch.randn(6, 8, dtype=torch.float64)
    plain = nn.Parameter(base[:, ::2].clone())
    odd = nn.Parameter(base[:, ::2])
    gradient = torch.randn(4, 6, dtype=torch.float64).T
    assert not odd.is_contiguous()
    for p in (plain, odd):
        optimizer = HFAdamW([p], **SETTINGS)
        for _ in range(3):
            p.grad = gradient
            optimizer.step()
    assert torch.equal(plain, odd)


def test_saved_state_goes_on():
    p = nn.Parameter(torch.ones(5))
    optimizer = HFAdamW([p], **SETTINGS)
    p.grad = torch.arange(5.0)
    optimizer.step()
    q = nn.Parameter(p.detach().clone())
    twin = HFAdamW([q])
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    q.grad = p.grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(p, q)


def test_zero_gradients_only_decay():
    p = nn.Parameter(torch.ones(3))
    optimizer = HFAdamW([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95))


@pytest.mark.parametrize("setting", [{"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": -1e-8}, {"weight_decay": -0.1}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(setting))}"):
        HFAdamW([nn.Parameter(torch.ones(2))], **setting)
