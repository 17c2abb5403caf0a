"""SGDP, against the published equations written for one parameter."""

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from tests.optimizer.test_adamp import orthogonal, project
from trainkit.optimizer.sgdp import SGDP


def equations(lr, momentum, dampening, decay, nesterov, eps, delta, ratio):
    def formula(t, w, g, kept):
        b = kept["b"] = momentum * kept.get("b", 0) + (1 - dampening) * g
        u, rho = project(w, g, g + momentum * b if nesterov else b, delta, ratio, eps)
        if not nesterov:
            kept["b"] = u
        return w * (1 - lr * decay * rho / (1 - momentum)) - lr * u

    return formula


@pytest.mark.parametrize("delta", [0.0, 0.1, 1.0, 1e9])
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0.9, 0.0, True), (0.8, 0.3, False), (0.8, 0.3, True), (0.0, 0.0, False)]
)
def test_the_equations(momentum, dampening, nesterov, delta):
    values = (0.05, momentum, dampening, 0.01, nesterov, 1e-8, delta, 0.2)
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "eps", "delta", "wd_ratio")
    toy.follows(lambda ps: SGDP(ps, **dict(zip(names, values, strict=True))), equations(*values))


@pytest.mark.parametrize("nesterov", [True, False])
def test_nothing_goes_along_rows_that_are_orthogonal_to_their_gradient(nesterov):
    p = nn.Parameter(torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    optimizer = SGDP([p], lr=0.1, momentum=0.9, nesterov=nesterov)
    for t in range(1, 5):
        start = p.detach().clone()
        p.grad = orthogonal(start, toy.gradients([p], t)[0], True)
        optimizer.step()
        assert (start * (p.detach() - start)).sum(1).abs().max() < 1e-7
        assert (p.detach() - start).norm() > 0.1


def test_without_a_limit_it_is_sgd():
    """... with the decay outside of the momentum, so without decay."""
    toy.same(
        lambda ps: SGDP(ps, lr=0.1, momentum=0.9, delta=0.0, nesterov=True),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
    )


@pytest.mark.parametrize("nesterov", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiled_it_is_the_same(nesterov):
    shapes = [(100, 90), (7,)]
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "delta": 1e9 if nesterov else 1.0}
    settings |= {"nesterov": nesterov}
    toy.same(lambda ps: SGDP(ps, **settings, compile=True), lambda ps: SGDP(ps, **settings), shapes=shapes)


@pytest.mark.parametrize(
    ("key", "value"), [("momentum", 1.0), ("dampening", -0.1), ("delta", -1.0), ("wd_ratio", -1.0)]
)
def test_settings_out_of_range(key, value):
    with pytest.raises(ValueError, match=f"optimizer.{key}"):
        SGDP([nn.Parameter(torch.zeros(2))], lr=0.1, **{key: value})


def test_it_resumes():
    toy.resumes(lambda ps: SGDP(ps, lr=0.1, momentum=0.9, delta=1.0))


def test_bytes():
    params = toy.parameters(dtype=torch.float32)
    optimizer = SGDP(params, lr=0.1)
    toy.take(optimizer, params, 1)
    assert toy.state_bytes(optimizer) == 4 * sum(p.numel() for p in params)
