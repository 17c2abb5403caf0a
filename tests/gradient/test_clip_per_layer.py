"""Clipping tensor by tensor."""

import pytest
import torch

from tests.menu import build

SHAPES = [(3, 4), (5,), (2, 2, 3)]


def gradients(*scales, dtype=torch.float64):
    torch.manual_seed(0)
    return [(torch.randn(s, dtype=torch.float64) * c).to(dtype) for s, c in zip(SHAPES, scales, strict=True)]


@pytest.mark.parametrize("relative", [False, True])
def test_each_is_clipped_as_if_it_were_alone(relative):
    made, expected = gradients(10.0, 0.01, 1.0), gradients(10.0, 0.01, 1.0)
    values = build("gradient", "gradient=clip_per_layer", "gradient.max_norm=0.5", f"gradient.relative={relative}")(
        made
    )
    for before, after in zip(expected, made, strict=True):
        limit = 0.5 * before.numel() ** 0.5 if relative else 0.5
        p = torch.nn.Parameter(torch.zeros_like(before))
        p.grad = before.clone()
        torch.nn.utils.clip_grad_norm_([p], limit)
        torch.testing.assert_close(after, p.grad, rtol=1e-12, atol=0)
    norm = torch.cat([g.flatten() for g in made]).norm()
    torch.testing.assert_close(values["grad_norm/clipped"], norm, rtol=1e-12, atol=0)
    assert torch.equal(made[1], expected[1])


def test_zeros_stay_and_what_is_not_finite_stays_so_alone():
    clip = build("gradient", "gradient=clip_per_layer")
    made = [torch.zeros(3), torch.tensor([1.0, float("nan")]), torch.tensor([2.0, float("inf")]), torch.ones(4)]
    clip(made)
    assert torch.equal(made[0], torch.zeros(3))
    assert made[1].isnan().all()
    assert not made[2].isfinite().all()
    torch.testing.assert_close(made[3], torch.full((4,), 0.5))


def test_squares_beyond_half_precision():
    made = [torch.full((4,), 300.0, dtype=torch.float16)]
    build("gradient", "gradient=clip_per_layer")(made)
    torch.testing.assert_close(made[0], torch.full((4,), 0.5, dtype=torch.float16))


def test_a_limit_of_zero_is_refused():
    with pytest.raises(Exception, match=r"gradient\.max_norm must be positive"):
        build("gradient", "gradient=clip_per_layer", "gradient.max_norm=0")
