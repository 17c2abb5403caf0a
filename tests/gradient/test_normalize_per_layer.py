"""Every tensor's gradient at the same length."""

import pytest
import torch

from trainkit.gradient.normalize_per_layer import NormalizePerLayer


@pytest.mark.parametrize("norm", ["l2", "rms"])
def test_formula(norm):
    torch.manual_seed(0)
    made = [torch.randn(s, dtype=torch.float64) * c for s, c in (((3, 4), 10.0), ((5,), 1e-6), ((), 2.0))]
    expected = [g.clone() for g in made]
    assert NormalizePerLayer(norm, scale=3.0, eps=1e-7)(made) == {}
    for before, after in zip(expected, made, strict=True):
        length = before.square().sum().sqrt() / (before.numel() ** 0.5 if norm == "rms" else 1)
        torch.testing.assert_close(after, 3.0 * before / (length + 1e-7), rtol=1e-12, atol=0)
    assert made[0].norm().item() == pytest.approx(3.0 * (12**0.5 if norm == "rms" else 1), rel=1e-6)


def test_the_size_of_the_gradient_is_forgotten():
    ends = []
    for scale in (1.0, 1e6):
        made = [torch.linspace(-1, 1, 7) * scale]
        NormalizePerLayer()(made)
        ends.append(made[0])
    torch.testing.assert_close(*ends)


def test_zeros_stay_and_what_is_not_finite_stays_so_alone():
    made = [torch.zeros(3), torch.tensor([1.0, float("inf")]), torch.tensor([1.0, float("nan")]), torch.ones(4)]
    NormalizePerLayer()(made)
    assert torch.equal(made[0], torch.zeros(3))
    assert not made[1].isfinite().all()
    assert made[2].isnan().all()
    torch.testing.assert_close(made[3], torch.full((4,), 0.5))


def test_squares_beyond_half_precision():
    made = [torch.full((4,), 300.0, dtype=torch.float16)]
    NormalizePerLayer()(made)
    torch.testing.assert_close(made[0], torch.full((4,), 0.5, dtype=torch.float16))


@pytest.mark.parametrize("bad", [{"norm": "l1"}, {"eps": 0.0}, {"scale": -1.0}, {"scale": float("nan")}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=rf"gradient\.{next(iter(bad))}"):
        NormalizePerLayer(**bad)
