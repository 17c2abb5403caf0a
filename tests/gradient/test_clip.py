"""Clipping against torch's own."""

import pytest
import torch

from tests.menu import build


@pytest.mark.parametrize("max_norm", [0.1, 1e6])
def test_equals_torch(max_norm):
    torch.manual_seed(0)
    gradients = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    values = build("gradient", "gradient=clip", f"gradient.max_norm={max_norm}")(gradients)
    for p, g in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-12, atol=0)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    torch.testing.assert_close(values["grad_norm/clipped"], norm, rtol=1e-12, atol=0)


def test_none_leaves_gradients_alone():
    gradient = torch.ones(3)
    assert build("gradient", "gradient=none")([gradient]) == {}
    assert torch.equal(gradient, torch.ones(3))


def test_a_non_finite_norm_stays_visible():
    gradient = torch.tensor([1.0, float("nan")])
    build("gradient", "gradient=clip")([gradient])
    assert gradient.isnan().all()


def test_a_limit_of_zero_is_refused():
    with pytest.raises(Exception, match=r"gradient\.max_norm must be positive"):
        build("gradient", "gradient=clip", "gradient.max_norm=0")
