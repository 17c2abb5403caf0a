"""LARS and LARC, against their equations written for one parameter."""

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from trainkit.optimizer.lars import LARS


def equations(lr, momentum, dampening, decay, nesterov, coefficient, clips, always):
    def formula(t, w, g, kept):
        r = 1.0
        if decay or always:
            if w.norm() > 0 and g.norm() > 0:
                r = coefficient * w.norm() / (g.norm() + decay * w.norm() + 1e-8)
            r = min(r / lr, 1.0) if clips else r
            g = r * (g + decay * w)
        if not momentum:
            return w - lr * g
        b = kept["b"] = momentum * kept["b"] + (1 - dampening) * g if kept else g
        return w - lr * (g + momentum * b if nesterov else b)

    return formula


NAMES = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "trust_coeff", "trust_clip", "always_adapt")


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(
    "values",
    [
        (2.0, 0.9, 0.0, 0.01, False, 0.02, False, False),
        (0.1, 0.9, 0.0, 0.01, True, 0.02, True, True),
        (0.1, 0.8, 0.3, 0.0, False, 0.5, True, True),
        (0.1, 0.9, 0.3, 0.0, False, 0.02, False, False),
        (0.1, 0.0, 0.0, 0.01, False, 0.02, False, False),
        (0.1, 0.0, 0.0, 0.0, False, 0.02, False, False),
    ],
)
def test_the_equations(values, block, monkeypatch):
    if block:
        monkeypatch.setattr("trainkit.optimizer.multi_tensor.BLOCK", block)
        monkeypatch.setattr("trainkit.optimizer.multi_tensor.WINDOW", 40)
    toy.follows(lambda ps: LARS(ps, **dict(zip(NAMES, values, strict=True))), equations(*values))


def test_the_size_of_a_layers_gradient_has_no_effect():
    ours, theirs = toy.parameters(), toy.parameters()
    settings = {"lr": 0.5, "momentum": 0.9, "always_adapt": True, "eps": 0.0}
    one, two = LARS(ours, **settings), LARS(theirs, **settings)
    for t in range(1, 4):
        toy.give(ours, t)
        for i, (p, g) in enumerate(zip(theirs, toy.gradients(theirs, t), strict=True)):
            p.grad = 10**i * g
        one.step()
        two.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_larc_bounds_the_rate_of_every_layer_by_lr():
    p = nn.Parameter(torch.full((4, 3), 1000.0))
    optimizer = LARS([p], lr=0.1, trust_clip=True, always_adapt=True)
    p.grad = torch.full((4, 3), 1e-3)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4, 3), 1000.0) - 0.1 * 1e-3)


def test_it_is_sgd_without_adaptation():
    toy.same(lambda ps: LARS(ps, lr=0.1, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9))


@pytest.mark.parametrize("changed", [{"nesterov": True}, {"momentum": 0.0}, {"dampening": 0.1}])
def test_compiled_it_is_the_same(changed):
    shapes = [(100, 90), (7,), (130, 70)]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **changed}
    toy.same(lambda ps: LARS(ps, **settings, compile=True), lambda ps: LARS(ps, **settings), shapes=shapes)


def test_zero_norms_and_a_rate_of_zero():
    p, q = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = LARS([p, q], lr=0.0, weight_decay=0.1, trust_clip=True)
    p.grad, q.grad = torch.ones_like(p), torch.zeros_like(q)
    optimizer.step()
    assert torch.equal(p, torch.zeros(4, 3))
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4, 3), -0.5))
    torch.testing.assert_close(q.detach(), torch.full((4, 3), 0.95))  # ratio 1: a full step of decay


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="nesterov"):
        LARS([nn.Parameter(torch.zeros(2))], nesterov=True)
    with pytest.raises(ValueError, match=r"optimizer\.trust_coeff"):
        LARS([nn.Parameter(torch.zeros(2))], trust_coeff=0.0)


def test_it_resumes():
    toy.resumes(lambda ps: LARS(ps, lr=0.5, momentum=0.9, weight_decay=0.01, trust_coeff=0.1))


def test_bytes():
    for momentum, size in ((0.9, 4), (0.0, 0)):
        params = toy.parameters(dtype=torch.float32)
        optimizer = LARS(params, momentum=momentum)
        toy.take(optimizer, params, 1)
        assert toy.state_bytes(optimizer) == size * sum(p.numel() for p in params)
