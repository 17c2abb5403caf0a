"""diffGrad, against its equations written for one parameter."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from trainkit.optimizer.diffgrad import DiffGrad, exp2


def equations(lr, betas, eps, decay):
    def formula(t, w, g, kept):
        g = g + decay * w
        m = kept["m"] = betas[0] * kept.get("m", 0) + (1 - betas[0]) * g
        v = kept["v"] = betas[1] * kept.get("v", 0) + (1 - betas[1]) * g**2
        friction = 1 / (1 + torch.exp(-(kept.get("g", 0) - g).abs()))
        kept["g"] = g
        return w - lr * math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m * friction / (v.sqrt() + eps)

    return formula


@pytest.mark.parametrize("values", [(0.01, (0.9, 0.999), 1e-8, 0.0), (0.03, (0.8, 0.99), 1e-3, 0.1)])
def test_the_equations(values):
    names = ("lr", "betas", "eps", "weight_decay")
    toy.follows(lambda ps: DiffGrad(ps, **dict(zip(names, values, strict=True))), equations(*values), steps=7)


def steps_beside_adam(gradients):
    """What diffGrad and Adam move with these gradients, each step. eps=0, as the two add it in different places."""
    start = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    ours, adam = DiffGrad([p], lr=0.01, eps=0.0), torch.optim.Adam([q], lr=0.01, eps=0.0)
    for g in gradients:
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        adam.step()
        yield p.detach() - before[0], q.detach() - before[1]


def test_a_gradient_that_stays_gives_half_of_adams_step():
    """Also where it is written into the same memory again, which misled the authors' first version."""
    g = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for t, (ours, adams) in enumerate(steps_beside_adam([g] * 4), 1):
        if t > 1:
            torch.testing.assert_close(ours, adams / 2)


def test_a_gradient_that_jumps_gives_adams_step():
    g = torch.full((5, 4), 1e3, dtype=torch.float64)
    for ours, adams in steps_beside_adam([g, -g, 3 * g, -g]):
        torch.testing.assert_close(ours, adams)


def test_the_ratio_to_adam_lies_between_one_half_and_one():
    drawn = [torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(t)) for t in range(5)]
    for ours, adams in steps_beside_adam(drawn):
        ratio = ours / adams
        assert (ratio >= 0.5 - 1e-9).all()
        assert (ratio < 1).all()


def test_the_gradients_memory_is_not_kept():
    p = nn.Parameter(torch.ones(5))
    optimizer = DiffGrad([p])
    p.grad = torch.ones(5)
    optimizer.step()
    p.grad.zero_()
    assert torch.equal(optimizer.state[p]["previous_grad"], torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_it_is_the_same(dtype):
    shapes, settings = [(100, 90), (7,), (130, 70)], {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
    compiled = partial(DiffGrad, **settings, compile=True)
    toy.same(compiled, partial(DiffGrad, **settings), shapes=shapes, dtype=dtype, **close)


def test_powers_of_two_of_our_own():
    x = torch.linspace(-126, 0, 100_001)
    torch.testing.assert_close(exp2(x).double(), x.double().exp2(), rtol=3e-7, atol=0.0)
    tiny, nothing = exp2(torch.tensor([-127.0, -math.inf])), exp2(torch.tensor([math.nan]))
    assert (tiny == 2.0**-126).all()
    assert nothing.isnan().all()


def test_it_resumes():
    toy.resumes(lambda ps: DiffGrad(ps, lr=0.01))


def test_bytes():
    params = toy.parameters(dtype=torch.float32)
    optimizer = DiffGrad(params)
    toy.take(optimizer, params, 1)
    assert toy.state_bytes(optimizer) == 12 * sum(p.numel() for p in params)
