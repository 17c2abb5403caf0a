"""Units, ranks and weights against loops over their definitions, in float64."""

import math

import pytest
import torch
from torch import nn

from trainkit.measure import plasticity
from trainkit.measure.plasticity import Units
from trainkit.norm_layer.batch import BatchNorm2d


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    """After a ReLU, of channels on axis 1 that differ in size; channel 0 is dead and channel 1 nearly so."""
    h = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    h = h * torch.arange(shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    h[:, 1] *= 1e-3
    return h.relu()


@pytest.mark.parametrize("shape", [(40, 7), (6, 7, 3, 2), (5, 7, 4)])
@pytest.mark.parametrize("tau", [0.0, 0.025, 0.5])
def test_fractions_of_units(shape, tau):
    h = activations(*shape)
    channels = [h[:, c].flatten().tolist() for c in range(shape[1])]  # mean over batch and space per channel
    means = [sum(abs(v) for v in values) / len(values) for values in channels]
    layer = sum(means) / len(means)
    dormant = sum(m / layer <= tau for m in means) / len(means)
    dead = sum(all(v <= 0 for v in values) for values in channels) / len(channels)
    active = sum(v > 0 for values in channels for v in values) / h.numel()
    assert 0 < dead < 1
    assert float(plasticity.dormant_fraction(h, tau)) == pytest.approx(dormant, abs=1e-12)
    assert float(plasticity.dead_fraction(h)) == pytest.approx(dead, abs=1e-12)
    assert float(plasticity.active_fraction(h)) == pytest.approx(active, abs=1e-12)
    moved = h.movedim(1, -1)
    assert float(plasticity.dormant_fraction(moved, tau, axis=-1)) == pytest.approx(dormant, abs=1e-12)


def test_negative_units_are_dead_but_not_dormant():
    h = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]])
    assert plasticity.dormant_fraction(h, 0.1) == 0
    assert plasticity.dead_fraction(h) == 0.5


def test_a_layer_in_which_nothing_happens_is_all_dormant():
    h = torch.zeros(4, 3)
    assert plasticity.dormant_fraction(h, 0.0) == plasticity.dead_fraction(h) == 1
    assert plasticity.active_fraction(h) == 0


def test_units_add_up_over_batches():
    h = activations(12, 5, 2, 2)
    whole, parts = Units.of(h), Units.of(h[:3]) + Units.of(h[3:])
    for name in ("dormant", "dead", "active"):
        assert float(getattr(parts, name)()) == pytest.approx(float(getattr(whole, name)()), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_have_no_numbers(bad):
    h = activations(10, 4)
    h[3, 2] = bad
    found = [plasticity.dormant_fraction(h), plasticity.dead_fraction(h), plasticity.active_fraction(h)]
    found += [plasticity.srank(h), plasticity.effective_rank(h), plasticity.stable_rank(h)]
    assert all(value.isnan() for value in found)


def with_singular_values(values: list[float], samples: int = 30) -> torch.Tensor:
    count = len(values)
    left = torch.linalg.qr(torch.randn(samples, count, generator=generator(1), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(count, count, generator=generator(2), dtype=torch.float64)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("delta", [0.01, 0.1, 0.5])
def test_ranks_of_known_singular_values(delta):
    values = [8.0, 4.0, 2.0, 1.0, 0.1, 0.01]
    h = with_singular_values(values)
    total = sum(values)
    k = next(k for k in range(1, 7) if sum(values[:k]) / total >= 1 - delta)
    assert int(plasticity.srank(h, delta)) == k
    p = [v / total for v in values]
    entropy = -sum(q * math.log(q) for q in p)
    assert float(plasticity.effective_rank(h)) == pytest.approx(math.exp(entropy), rel=1e-10)
    assert float(plasticity.stable_rank(h)) == pytest.approx(sum(v * v for v in values) / 64, rel=1e-10)


def test_the_ranks_of_equal_directions_are_their_number_and_of_zeros_zero():
    h = with_singular_values([3.0] * 4)
    for rank in (plasticity.srank, plasticity.effective_rank, plasticity.stable_rank):
        assert float(rank(h)) == pytest.approx(4, rel=1e-10)
        assert float(rank(100 * h)) == pytest.approx(float(rank(h)))
        assert float(rank(torch.zeros(5, 3))) == 0
        assert float(rank(torch.ones(6, 3))) == pytest.approx(1, rel=1e-5)
    with pytest.raises(ValueError, match="matrix"):
        plasticity.srank(torch.zeros(2, 3, 4))


def test_half_precision_is_widened():
    h = activations(64, 6).to(torch.bfloat16)
    assert plasticity.effective_rank(h).dtype == plasticity.dormant_fraction(h).dtype == torch.float32
    huge = torch.full((1000, 4), 6e4, dtype=torch.float16)
    assert plasticity.dormant_fraction(huge) == 0
    assert plasticity.weight_norm(huge) == pytest.approx(6e4 * math.sqrt(4000), rel=1e-3)


def test_rows_are_thinned_evenly():
    h = torch.arange(20.0).reshape(10, 2)
    assert plasticity.rows(h, most=5)[:, 0].tolist() == [0, 4, 8, 12, 16]
    assert torch.equal(plasticity.rows(h, most=50), h)
    images = torch.arange(24.0).reshape(2, 3, 2, 2)
    assert plasticity.rows(images)[:, 1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19]


def test_weights_are_those_of_layers_each_once():
    model = nn.ModuleDict(
        {"embed": nn.Embedding(5, 4), "conv": nn.Conv2d(1, 2, 3), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 5)}
    )
    model["head"].weight = model["embed"].weight
    frozen = nn.Linear(3, 3).requires_grad_(False)
    model["frozen"] = frozen
    assert list(plasticity.weights(model)) == ["embed", "conv"]


@pytest.mark.parametrize(("scale_free", "power"), [(True, 1), (False, 2)])
def test_the_effective_rate_is_that_of_the_direction(scale_free, power):
    """One step on c W turns it as one step with the effective rate times c^power would turn W, f(c W) = f(W)."""
    w = torch.randn(6, generator=generator(), dtype=torch.float64)
    goal = torch.randn(6, generator=generator(3), dtype=torch.float64)

    def stepped(weight: torch.Tensor, lr: float) -> torch.Tensor:
        weight = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(torch.cosine_similarity(weight, goal, dim=0), weight)
        return weight.detach() - lr * (gradient / gradient.norm() if scale_free else gradient)

    for c in (0.5, 3.0):
        rate = plasticity.effective_lr(0.1, plasticity.weight_norm(c * w), scale_free=scale_free)
        assert float(rate) == pytest.approx(0.1 / float((c * w).norm()) ** power)
        turned = stepped(c * w, 0.1)
        same = stepped(w / w.norm(), float(rate))
        assert torch.cosine_similarity(turned, same, dim=0).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("turn", [1e-6, 1e-3, 0.5, 3.0])
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-9), (torch.float32, 2e-2)])
def test_the_angle_of_an_update_however_small(turn, dtype, rel):
    before = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=dtype)
    after = 5 * torch.tensor([[math.cos(turn), math.sin(turn)], [0.0, 0.0]], dtype=dtype)
    assert float(plasticity.angular_update(before, after)) == pytest.approx(turn, rel=rel)
    assert float(plasticity.angular_update(before, before)) == 0
    assert float(plasticity.angular_update(before, 0 * after)) == pytest.approx(math.pi / 2)


def test_the_drift_of_running_statistics():
    norm = BatchNorm2d(3, axis=1).double()
    model = nn.Sequential(nn.Conv2d(1, 3, 1), norm)
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 9.0]))
    before = plasticity.statistics(model)
    norm.running_mean += torch.tensor([1.0, 2.0, -3.0])  # one standard deviation each
    norm.running_var *= torch.tensor([2.0, 0.5, 2.0])
    ((mean, var),) = plasticity.drift(before, plasticity.statistics(model), eps=0.0).values()
    assert float(mean) == pytest.approx(1)
    assert float(var) == pytest.approx(math.log(2))
    assert list(before) == ["1"]
    assert plasticity.drift({}, before) == {}
    assert torch.equal(before["1"][0], torch.zeros(3, dtype=torch.float64))  # a copy


def test_the_nuclear_norm_lies_between_one_direction_and_none():
    torch.manual_seed(0)
    one = torch.randn(50, 1, dtype=torch.float64) @ torch.randn(1, 4, dtype=torch.float64)
    scale = one.square().sum(1).mean().sqrt()
    assert float(plasticity.nuclear_norm(one)) == pytest.approx(float(scale))
    even = torch.eye(4, dtype=torch.float64).repeat(10, 1)  # rank 4, all directions alike, rows of length 1
    assert float(plasticity.nuclear_norm(even)) == pytest.approx(2.0)
    assert float(plasticity.nuclear_norm(even.repeat(3, 1))) == pytest.approx(2.0)
