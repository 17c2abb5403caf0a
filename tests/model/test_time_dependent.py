"""Norms whose gains and biases move with the noise of each sample."""

import pytest
import torch
from torch.nn import functional as F

from trainkit.model.parts.time_dependent import TimeDependentNorm


def moved(norm):
    with torch.no_grad():
        for p in norm.parameters():
            p += 0.5 * torch.randn_like(p)
    return norm


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def at(part, tau):
    """One sample's vector, by the equation."""
    s = 1 / (1 + torch.exp(-((1 + part.slope) * tau + part.shift)))
    return s * part.clean + (1 - s) * part.noisy


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(3, 6), (3, 4, 6), (3, 2, 4, 6)])
def test_formula_sample_by_sample(kind, shape):
    norm, x, log_snr = moved(TimeDependentNorm(6, kind=kind, eps=1e-2, divisor=3.0)), torch.randn(shape), torch.randn(3)
    y = norm(x, log_snr)
    for i in range(3):
        if kind == "layer":
            expected = F.layer_norm(x[i], (6,), eps=1e-2) * at(norm.gain, log_snr[i] / 3) + at(
                norm.bias, log_snr[i] / 3
            )
        else:
            expected = x[i] / (x[i].square().mean(-1, keepdim=True) ** 0.5 + 1e-2) * at(norm.gain, log_snr[i] / 3)
        assert torch.allclose(y[i], expected, rtol=1e-10, atol=1e-12)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in norm.parameters())


def test_at_the_start_time_does_not_matter_and_later_it_does():
    norm, x = TimeDependentNorm(6), torch.randn(3, 4, 6)
    assert torch.allclose(norm(x, torch.randn(3)), F.layer_norm(x, (6,)), rtol=1e-10, atol=1e-12)
    moved(norm)
    assert not torch.allclose(norm(x, torch.zeros(3)), norm(x, torch.ones(3)))
    for part in (norm.gain, norm.bias):
        part.slope.data.clamp_(min=-0.5)  # beyond -1, time runs backwards
    assert torch.allclose(norm(x, torch.full((3,), 1e4)), F.layer_norm(x, (6,), norm.gain.clean, norm.bias.clean))


def test_half_precision():
    norm, x = moved(TimeDependentNorm(6, kind="rms")), (1000 * torch.randn(3, 4, 6)).half()
    assert norm(x, torch.ones(3)).dtype == torch.float16
    assert torch.allclose(norm(x, torch.ones(3)).double(), norm(x.double(), torch.ones(3)), rtol=1e-2, atol=1e-2)


def test_bad_input():
    with pytest.raises(ValueError, match=r"log_snr must be of shape \(3,\); got \(1,\)"):
        TimeDependentNorm(6)(torch.randn(3, 4, 6), torch.ones(1))
    with pytest.raises(ValueError, match="kind is layer or rms; got 'batch'"):
        TimeDependentNorm(6, kind="batch")
    with pytest.raises(ValueError, match="at least 1 channel; got width 0"):
        TimeDependentNorm(0)
