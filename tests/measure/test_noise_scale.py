"""The gradient's noise scale: exact against variances of a batch, and unbiased over many."""

import pytest
import torch

from trainkit.measure.noise_scale import noise_scale


def test_groups_of_one_sample_give_the_variance_of_the_batch():
    gradients = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1
    mean = gradients.mean(0)
    found = noise_scale(gradients.square().sum(1).mean(), mean.square().sum(), samples=1, batch=6)
    trace = gradients.var(0, correction=1).sum()
    assert float(found["trace"]) == pytest.approx(float(trace), rel=1e-12)
    assert float(found["square"]) == pytest.approx(float(mean.square().sum() - trace / 6), rel=1e-12)
    assert float(found["scale"]) == pytest.approx(float(trace / (mean.square().sum() - trace / 6)), rel=1e-12)


def test_both_estimates_are_unbiased_for_larger_groups():
    generator, trials, size, groups = torch.Generator().manual_seed(1), 4000, 4, 3
    true, deviation = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 1.0, 3.0])
    samples = true + deviation * torch.randn(trials, groups, size, 3, generator=generator)
    by_group = samples.mean(2)
    small, big = by_group.square().sum(-1).mean(1), by_group.mean(1).square().sum(-1)
    found = noise_scale(small, big, samples=size, batch=size * groups)
    assert float(found["trace"].mean()) == pytest.approx(float(deviation.square().sum()), rel=0.03)
    assert float(found["square"].mean()) == pytest.approx(float(true.square().sum()), rel=0.03)


def test_a_gradient_lost_in_noise_has_an_infinite_scale():
    found = noise_scale(torch.tensor(1.0), torch.tensor(0.1), samples=1, batch=2)
    assert float(found["square"]) < 0
    assert float(found["scale"]) == float("inf")


def test_groups_as_large_as_the_batch_are_refused():
    with pytest.raises(ValueError, match="smaller than the batch"):
        noise_scale(torch.tensor(1.0), torch.tensor(1.0), samples=4, batch=4)
