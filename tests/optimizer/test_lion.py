"""Lion, against its three lines."""

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from trainkit.optimizer.lion import Lion


def lines(lr, betas, decay):
    def formula(t, w, g, kept):
        m = kept.setdefault("m", torch.zeros_like(w))
        u = torch.sign(betas[0] * m + (1 - betas[0]) * g)
        kept["m"] = betas[1] * m + (1 - betas[1]) * g
        return w * (1 - lr * decay) - lr * u

    return formula


@pytest.mark.parametrize(("betas", "decay"), [((0.9, 0.99), 0.3), ((0.95, 0.98), 0.0)])
def test_three_lines(betas, decay):
    toy.follows(lambda ps: Lion(ps, lr=0.01, betas=betas, weight_decay=decay), lines(0.01, betas, decay))


def test_each_entry_moves_by_lr_or_not_at_all():
    p = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    optimizer = Lion([p], lr=0.01)
    for t in range(1, 4):
        before = p.detach().clone()
        p.grad = toy.gradients([p], t)[0]
        p.grad[0] = 0.0
        optimizer.step()
        moved = (p.detach() - before).abs()
        assert not moved[0].any()
        torch.testing.assert_close(moved[1:], torch.full_like(moved[1:], 0.01))


def test_the_size_of_the_gradient_has_no_effect_and_the_first_step_is_its_sign():
    ours, theirs = toy.parameters(), toy.parameters()
    start = [p.detach().clone() for p in ours]
    one, two = Lion(ours, lr=0.01), Lion(theirs, lr=0.01)
    for t in range(1, 4):
        toy.give(ours, t)
        for p, g in zip(theirs, toy.gradients(theirs, t), strict=True):
            p.grad = 1000 * g
        one.step()
        two.step()
        if t == 1:
            for p, w in zip(ours, start, strict=True):
                torch.testing.assert_close(p.detach(), w - 0.01 * p.grad.sign())
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_half_precision_keeps_its_momentum_in_float32():
    """A thousand gradients of one sign: in bf16 the momentum would stop growing long before."""
    p = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = Lion([p], lr=0.0, betas=(0.9, 0.999))
    p.grad = torch.ones_like(p)
    for _ in range(1000):
        optimizer.step()
    m = optimizer.state[p]["exp_avg"]
    assert m.dtype == torch.float32
    torch.testing.assert_close(m, torch.full((4,), 1 - 0.999**1000), rtol=1e-4, atol=0)


def test_compiled_it_is_the_same():
    shapes = [(100, 90), (70, 130), (7,)]
    toy.same(
        lambda ps: Lion(ps, lr=0.01, weight_decay=0.1, compile=True),
        lambda ps: Lion(ps, lr=0.01, weight_decay=0.1),
        shapes=shapes,
    )


def test_it_resumes():
    toy.resumes(lambda ps: Lion(ps, lr=0.01))


def test_bytes():
    params = toy.parameters(dtype=torch.float32)
    optimizer = Lion(params)
    toy.take(optimizer, params, 1)
    assert toy.state_bytes(optimizer) == 4 * sum(p.numel() for p in params)
