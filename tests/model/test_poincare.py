"""Batch normalization in the Poincaré ball, against geometry written in another way and against its flat limit."""

import pytest
import torch

from trainkit.model.parts.poincare import PoincareBatchNorm, add, exp_0, exp_at, log_at, midpoint, transport


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


C = torch.tensor(0.7, dtype=torch.float64)


def distance(x, y, c):
    """By the inverse hyperbolic cosine."""
    gap = (x - y).square().sum(-1)
    below = (1 - c * x.square().sum(-1)) * (1 - c * y.square().sum(-1))
    return torch.acosh(1 + 2 * c * gap / below) / c**0.5


def points(n=12):
    return exp_0(0.6 * torch.randn(n, 5), C)


def test_logarithms_have_the_length_of_distances_and_come_back():
    p, x = points(1)[0], points()
    v = log_at(p, x, C)
    length = v.norm(dim=-1) * 2 / (1 - C * p.square().sum())
    assert torch.allclose(length, distance(p, x, C), rtol=1e-9)
    assert torch.allclose(exp_at(p, v, C), x, rtol=1e-9, atol=1e-12)


def test_transport_keeps_lengths_and_angles():
    p, q, v = points(1)[0], points(1)[0], torch.randn(4, 5)
    w = transport(p, q, v, C)
    factors = [2 / (1 - C * t.square().sum()) for t in (p, q)]
    assert torch.allclose(factors[1] ** 2 * w @ w.T, factors[0] ** 2 * v @ v.T, rtol=1e-9, atol=1e-12)
    assert torch.allclose(transport(p, p, v, C), v, rtol=1e-9, atol=1e-12)
    along = log_at(p, q, C)  # what points at q still points away from p there
    assert torch.allclose(transport(p, q, along, C), -log_at(q, p, C), rtol=1e-9, atol=1e-12)


def test_the_midpoint_of_two_is_halfway_and_moves_with_the_ball():
    x = points(2)
    m = midpoint(x, C)
    assert torch.allclose(distance(m, x[0], C), distance(m, x[1], C), rtol=1e-9)
    assert torch.allclose(2 * distance(m, x[0], C), distance(x[0], x[1], C), rtol=1e-9)
    x, shift = points(), points(1)[0]
    assert torch.allclose(midpoint(add(shift, x, C), C), add(shift, midpoint(x, C), C), rtol=1e-9, atol=1e-12)


def test_in_a_flat_ball_it_is_a_centred_batch_of_one_variance():
    norm, x = PoincareBatchNorm(5, c=1e-8), torch.randn(30, 5)
    with torch.no_grad():
        norm.mean.copy_(torch.randn(5))
        norm.var.fill_(2.5)
    centred = x - x.mean(0)
    v = 4 * centred.square().sum(-1).mean()  # lengths at the origin count twice
    expected = norm.mean + centred * (2.5 / v).sqrt()
    assert torch.allclose(norm(x), expected, rtol=1e-5, atol=1e-6)


def test_what_comes_out_has_the_mean_and_the_variance_asked_for():
    norm, x = PoincareBatchNorm(5, c=0.7, eps=0.0), 0.5 * torch.randn(3, 4, 5)
    y = exp_0(norm(x).flatten(0, 1), C)
    assert torch.allclose(midpoint(y, C), torch.zeros(5), atol=0.05)
    assert torch.allclose(distance(y, torch.zeros(5), C).square().mean(), torch.ones(()), rtol=1e-9)
    assert torch.equal(norm.eval()(x), norm.train()(x))


def test_gradients_by_differences_also_for_the_curvature():
    norm, x = PoincareBatchNorm(3), 0.5 * torch.randn(4, 3)
    norm.mean.data.copy_(0.3 * torch.randn(3))

    def run(x, *parameters):
        return torch.func.functional_call(norm, dict(zip(dict(norm.named_parameters()), parameters, strict=True)), (x,))

    inputs = [t.detach().clone().requires_grad_() for t in (x, *norm.parameters())]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_the_origin_and_the_edge_are_finite(scale):
    norm, x = PoincareBatchNorm(5), (scale * torch.randn(6, 5)).requires_grad_()
    y = norm(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in norm.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match="width of at least 1 and a c above 0; got 5 and 0"):
        PoincareBatchNorm(5, c=0)
    for shape in ((3, 4), (0, 5)):
        with pytest.raises(ValueError, match="needs vectors of 5 channels"):
            PoincareBatchNorm(5)(torch.randn(shape))
