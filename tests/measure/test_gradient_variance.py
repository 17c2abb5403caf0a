"""The tests of AdAdaGrad against their formulas, and what they promise."""

from math import ceil, inf, nan

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit.measure.gradient_variance import (
    Variances,
    augmented_test,
    grown,
    inner_product_test,
    norm_test,
    of_samples,
    per_sample_gradients,
    sums,
    variances,
)


@pytest.fixture
def stacks():
    """Per-sample gradients of three parameters, 12 samples each."""
    g = torch.Generator().manual_seed(0)
    return [0.5 + torch.randn(12, *shape, generator=g, dtype=torch.float64) for shape in ((4, 3), (2, 2, 2), (5,))]


def test_the_variances_are_those_of_the_formulas(stacks):
    found = of_samples(stacks)
    mean = [s.mean(0) for s in stacks]
    inner = [s.flatten(1) @ m.flatten() for s, m in zip(stacks, mean, strict=True)]  # <g_i, ḡ> of each tensor alone
    across = [
        s - (i / m.square().sum()).reshape(-1, *[1] * m.dim()) * m for s, m, i in zip(stacks, mean, inner, strict=True)
    ]
    square = sum(m.square().sum().item() for m in mean)
    expected = Variances(
        total=sum(s.var(0).sum().item() for s in stacks),
        along=sum(i.var().item() for i in inner),
        across=sum(o.var(0).sum().item() for o in across),
        square=square,
    )
    for name in ("total", "along", "across", "square"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-12)
    assert norm_test(found, eta=0.3) == pytest.approx(expected.total / (0.09 * square))
    assert inner_product_test(found, theta=0.3) == pytest.approx(expected.along / (0.09 * square**2))
    needs = expected.along / (0.09 * square**2), expected.across / (0.04 * square)
    assert augmented_test(found, theta=0.3, nu=0.2) == pytest.approx(max(needs))
    assert augmented_test(found, theta=1e-3, nu=1e3) == pytest.approx(expected.along / (1e-6 * square**2))


def test_equal_gradients_leave_the_batch_alone(stacks):
    found = of_samples([s[:1].expand_as(s) for s in stacks])
    for needed in (
        norm_test(found, eta=0.1),
        inner_product_test(found, theta=0.1),
        augmented_test(found, theta=0.1, nu=0.1),
    ):
        assert grown(12, needed) == 12


def test_twice_the_tolerance_needs_a_quarter(stacks):
    found = of_samples(stacks)
    assert norm_test(found, eta=0.1) == pytest.approx(4 * norm_test(found, eta=0.2))
    assert inner_product_test(found, theta=0.1) == pytest.approx(4 * inner_product_test(found, theta=0.2))
    assert augmented_test(found, theta=0.1, nu=0.3) == pytest.approx(4 * augmented_test(found, theta=0.2, nu=0.6))


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_of_the_gradients_does_not_matter(stacks, scale, dtype):
    plain, scaled = (of_samples([(c * s).to(dtype) for s in stacks]) for c in (1.0, scale))
    for test in (
        lambda v: norm_test(v, eta=0.1),
        lambda v: inner_product_test(v, theta=0.1),
        lambda v: augmented_test(v, theta=0.1, nu=0.2),
    ):
        assert test(scaled) == pytest.approx(test(plain), rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_processes_add_up(stacks):
    mean = [s.mean(0) for s in stacks]
    halves = [[s[:5] for s in stacks], [s[5:] for s in stacks]]
    together = sum(sums(half, mean) for half in halves)
    torch.testing.assert_close(together, sums(stacks, mean))


@pytest.mark.parametrize("sizes", [[4, 4, 4], [2, 4, 6], [1, 11]], ids=str)
def test_groups_estimate_the_variance_of_a_sample(sizes):
    """The mean of many estimates is the true variance, whatever the groups; and so with a part of the batch."""
    g = torch.Generator().manual_seed(0)
    batch, true = 12, 8 * 2.0**2
    found, partial = [], []
    for _ in range(1500):
        samples = 1.0 + 2.0 * torch.randn(batch, 8, generator=g, dtype=torch.float64)
        mean = [samples.mean(0)]
        groups = [torch.stack([part.mean(0) for part in samples.split(sizes)])]
        totals = sums(groups, mean, sizes).tolist()
        found.append(variances(totals, 1.0, groups=len(sizes), samples=batch, batch=batch).total)
        totals = sums([samples[:5]], mean).tolist()
        partial.append(variances(totals, 1.0, groups=5, samples=5, batch=batch).total)
    assert sum(found) / len(found) == pytest.approx(true, rel=0.05)
    assert sum(partial) / len(partial) == pytest.approx(true, rel=0.05)


def test_a_gradient_of_zeros():
    nothing = of_samples([torch.zeros(4, 3)])
    assert norm_test(nothing, eta=0.1) == inner_product_test(nothing, theta=0.1) == 0
    noise = of_samples([torch.tensor([[1.0], [-1.0]])])  # of mean zero
    assert norm_test(noise, eta=0.1) == inf
    assert augmented_test(noise, theta=0.1, nu=0.1) == inf


def test_the_batch_only_grows_and_never_beyond_its_limit():
    assert [grown(8, needed, 100) for needed in (0, 8, 8.1, 99.5, 100, 1e30, inf, nan)] == [
        8,
        8,
        9,
        100,
        100,
        100,
        100,
        8,
    ]
    assert grown(120, 110, 100) == 120
    assert grown(8, ceil(50)) == 50
    assert grown(8, inf) == 8
    overflow = Variances(total=inf, along=inf, across=inf, square=inf)
    assert grown(8, norm_test(overflow, eta=0.1), 100) == 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_gradients_are_summed_in_float32(stacks, dtype):
    stacks = [s.to(dtype) for s in stacks]
    exact = sums([s.double() for s in stacks], [s.double().mean(0) for s in stacks])
    found = sums(stacks, [s.double().mean(0) for s in stacks])
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


class Net(nn.Module):
    def __init__(self, norm=nn.Identity):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), norm(), nn.Linear(6, 3)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def test_per_sample_gradients_are_those_of_one_sample_at_a_time():
    torch.manual_seed(0)
    model, batch = Net().double(), (torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,)))
    found = per_sample_gradients(model, cross_entropy, batch)
    assert set(found) == {"first.weight", "first.bias", "last.weight"}
    for i in range(5):
        model.zero_grad()
        cross_entropy(model, (batch[0][i : i + 1], batch[1][i : i + 1])).backward()
        for name, gradients in found.items():
            torch.testing.assert_close(gradients[i], model.get_parameter(name).grad)


def test_a_model_that_mixes_samples_has_none():
    batch = torch.randn(5, 4), torch.randint(3, (5,))
    with pytest.raises(ValueError, match="no gradient per sample"):
        per_sample_gradients(Net(lambda: nn.BatchNorm1d(6)), cross_entropy, batch)
