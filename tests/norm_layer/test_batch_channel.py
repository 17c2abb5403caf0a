"""Batch-channel normalization: batch norm or its estimate, then groups of channels."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit.norm_layer.batch_channel import BatchChannelNorm
from trainkit.norm_layer.estimated_batch import EstimatedBatchNorm, set_speed
from trainkit.norm_layer.stateful import advance

from .stateful import WIDTH, data, float64, same, state, train  # noqa: F401

IMAGES = (2, WIDTH, 3, 5)


def moved(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def channels(p):
    return p.view(-1, 1, 1)


def test_batch_norm_then_groups_with_a_pair_of_numbers_each():
    layer = moved(BatchChannelNorm(WIDTH, axis=1, groups=2, eps=1e-3, eps_channel=1e-2))
    bn, gn = nn.BatchNorm2d(WIDTH, eps=1e-3), nn.GroupNorm(2, WIDTH, eps=1e-2, affine=False)
    bn.load_state_dict(layer.bn.state_dict())
    for x, gy in data(3, *IMAGES):
        h = x.clone().requires_grad_()
        gain, bias = (p.detach().clone().requires_grad_() for p in (layer.gain, layer.bias))
        z = gn(bn(h)).unflatten(1, (2, -1))
        expected = (z * gain.view(2, 1, 1, 1) + bias.view(2, 1, 1, 1)).flatten(1, 2)
        bn.zero_grad()
        layer.zero_grad()
        expected.backward(gy)
        y, gx = train(layer, x, gy)
        assert torch.allclose(y, expected, rtol=1e-12)
        for a, b in ((gx, h), (layer.gain.grad, gain), (layer.bias.grad, bias), (layer.bn.weight.grad, bn.weight)):
            assert torch.allclose(a, b.grad, rtol=1e-9, atol=1e-12)
        assert same(state(layer.bn), state(bn), rtol=1e-12)
    x = torch.randn(IMAGES)
    z = gn(bn.eval()(x)).unflatten(1, (2, -1))
    expected = (z * layer.gain.view(2, 1, 1, 1) + layer.bias.view(2, 1, 1, 1)).flatten(1, 2)
    assert torch.allclose(layer.eval()(x), expected, rtol=1e-12)


@pytest.mark.parametrize("count", ["call", "step"])
def test_estimated_statistics_move_first_and_then_normalize(count):
    layer = moved(EstimatedBatchNorm(WIDTH, axis=1, eps=1e-3, count=count))
    mean, var = torch.zeros(WIDTH), torch.ones(WIDTH)
    for speed, (x, gy) in zip((0.3, 0.1, 0.0), data(3, *IMAGES), strict=True):
        set_speed(layer, speed)
        flat = x.transpose(0, 1).flatten(1)
        var = (1 - speed) * var + speed * (flat - mean.unsqueeze(1)).square().mean(1)
        mean = (1 - speed) * mean + speed * flat.mean(1)
        a = layer.weight / (var + 1e-3).sqrt()
        y, gx = train(layer, x, gy)
        assert torch.allclose(y, channels(a) * (x - channels(mean)) + channels(layer.bias), rtol=1e-10, atol=1e-12)
        assert torch.allclose(gx, channels(a) * gy, rtol=1e-12)  # the statistics are constants
        advance(layer)
        assert torch.allclose(layer.running_mean, mean, rtol=1e-12)
        assert torch.allclose(layer.running_var, var, rtol=1e-12)
    x = torch.randn(IMAGES)
    y = layer(x)
    assert torch.equal(layer.eval()(x), y)  # at speed 0, training is eval
    assert layer.num_batches_tracked == 0


def test_estimated_statistics_of_micro_batches_are_one_move_per_step():
    layer, whole = (EstimatedBatchNorm(WIDTH, axis=1, speed=0.3, count="step") for _ in range(2))
    for x, gy in data(3, 4, WIDTH, 3, 5):
        for part, g in zip(x.split([1, 3]), gy.split([1, 3]), strict=True):
            train(layer, part, g)
        train(whole, x, gy)
        advance(layer)
        advance(whole)
        assert same(state(layer), state(whole), rtol=1e-12)


def test_a_checkpointed_forward_sees_what_the_first_saw():
    layer = moved(EstimatedBatchNorm(WIDTH, axis=1, speed=0.3))
    twin = copy.deepcopy(layer)
    for x, gy in data(2, *IMAGES):
        expected = train(layer, x, gy)
        h = x.clone().requires_grad_()
        y = checkpoint(twin, h, use_reentrant=False)
        y.backward(gy)
        assert torch.allclose(y, expected[0], rtol=1e-12)
        assert torch.allclose(h.grad, expected[1], rtol=1e-12)
        assert same(state(layer), state(twin), rtol=0, atol=0)
        assert all(torch.allclose(p.grad, q.grad) for p, q in zip(layer.parameters(), twin.parameters(), strict=True))


def test_a_batch_of_one_and_blindness_to_the_scale_of_a_sample():
    layer = BatchChannelNorm(WIDTH, axis=1, groups=2, statistics="estimated", speed=0.0, eps_channel=0.0)
    x = torch.randn(1, WIDTH, 3, 5)
    assert torch.allclose(layer(7 * x), layer(x), rtol=1e-9, atol=1e-12)
    set_speed(layer, 0.1)
    before = layer.bn.running_mean.clone()
    assert layer(x).isfinite().all()
    assert not torch.equal(layer.bn.running_mean, before)


def test_no_samples_move_nothing():
    layer = EstimatedBatchNorm(WIDTH, axis=1, speed=0.5)
    before = state(layer)
    assert layer(torch.randn(0, WIDTH, 3, 5)).shape == (0, WIDTH, 3, 5)
    assert same(state(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize("statistics", ["batch", "estimated"])
def test_half_precision_and_resume(statistics):
    settings = {"axis": 1, "groups": 2, "statistics": statistics, "count": "step"}
    layer = moved(BatchChannelNorm(WIDTH, **settings))
    x = (1000 * torch.randn(IMAGES)).half()
    y = copy.deepcopy(layer).float()(x)
    assert y.dtype == torch.float16
    assert torch.allclose(y.double(), copy.deepcopy(layer)(x.double()), rtol=0.02, atol=0.02)
    casted = copy.deepcopy(layer).half()
    assert {b.dtype for b in casted.buffers() if b.is_floating_point()} == {torch.float64}
    for x, gy in data(2, *IMAGES):
        train(layer, x, gy)
        advance(layer)
    resumed = BatchChannelNorm(WIDTH, **settings)
    resumed.load_state_dict(layer.state_dict())
    (x, gy), *_ = data(1, *IMAGES)
    for a, b in zip(train(resumed, x, gy), train(layer, x, gy), strict=True):
        assert torch.equal(a, b)
    advance(resumed)
    advance(layer)
    assert same(state(resumed), state(layer), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"groups": 3}, "norm_layer.groups must divide the width 8; got 3"),
        ({"groups": 2, "statistics": "old"}, "norm_layer.statistics is batch or estimated; got 'old'"),
        ({"groups": 2, "statistics": "estimated", "speed": 2.0}, "norm_layer.speed is a weight between 0 and 1; got 2"),
    ],
)
def test_bad_input(settings, says):
    with pytest.raises(ValueError, match=says):
        BatchChannelNorm(WIDTH, **settings)
