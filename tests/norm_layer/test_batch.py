import copy

import pytest
import torch
from torch import nn

from trainkit.norm_layer.batch import BatchNorm, batch

from .stateful import WIDTH, data, float64, same, state, train  # noqa: F401


@pytest.mark.parametrize("momentum", [0.1, 0.3, None])
def test_tokens_as_torch(momentum):
    ours, torchs = batch(WIDTH, momentum=momentum), nn.BatchNorm1d(WIDTH, momentum=momentum)
    for x, gy in data(3):
        expected, actual = train(torchs, x.flatten(0, 1), gy.flatten(0, 1)), train(ours, x, gy)
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a.flatten(0, 1), b)
        assert same(state(ours), state(torchs), rtol=1e-14)
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(ours.eval()(x).flatten(0, 1), torchs.eval()(x.flatten(0, 1)))


def test_images_as_torch():
    ours, torchs = batch(WIDTH, axis=1), nn.BatchNorm2d(WIDTH)
    assert isinstance(ours, nn.BatchNorm2d)
    assert not isinstance(batch(WIDTH), nn.BatchNorm2d)
    for x, gy in data(3, 2, WIDTH, 4, 5):
        for a, b in zip(train(ours, x, gy), train(torchs, x, gy), strict=True):
            assert torch.equal(a, b)
        assert same(state(ours), state(torchs), rtol=1e-14)


def test_padding_is_as_if_it_were_not_there():
    ours, torchs = batch(WIDTH), nn.BatchNorm1d(WIDTH)
    for x, gy in data(3):
        pad = torch.rand(x.shape[:2]) < 0.4
        y, gx = train(ours, x, gy * ~pad.unsqueeze(-1), pad_mask=pad)
        expected = train(torchs, x[~pad], gy[~pad])
        assert torch.allclose(y[~pad], expected[0], rtol=1e-12)
        assert torch.allclose(gx[~pad], expected[1], rtol=1e-9, atol=1e-14)
        assert not gx[pad].any()
        assert same(state(ours), state(torchs), rtol=1e-12)
    assert torch.allclose(ours.weight.grad, torchs.weight.grad)
    assert torch.allclose(ours.bias.grad, torchs.bias.grad)


def test_gradient_reaches_the_statistics_from_padding_too():
    norm, pad = batch(3), torch.tensor([[False, True, False, False], [False, False, True, True]])
    x = torch.randn(2, 4, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: norm(x, pad_mask=pad), x)


def test_one_position_is_normalized_by_the_running_statistics():
    norm = batch(WIDTH)
    for x, gy in data(2):
        train(norm, x, gy)
    before, x = state(norm), torch.randn(1, 1, WIDTH)
    y, gx = train(norm, x, torch.ones_like(x))
    expected = train(copy.deepcopy(norm).eval(), x, torch.ones_like(x))
    assert torch.allclose(y, expected[0])
    assert torch.allclose(gx, expected[1])
    assert same(state(norm), before, rtol=0, atol=0)


def test_without_running_statistics_as_torch():
    """What test-time adaptation does to a batch norm."""
    ours, torchs = batch(WIDTH, axis=1), nn.BatchNorm2d(WIDTH)
    for norm in (ours, torchs):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        norm.eval()
    x = torch.randn(4, WIDTH, 2, 2)
    assert torch.equal(ours(x), torchs(x))
    with pytest.raises(ValueError, match="no fixed affine map"):
        ours.scale_shift()


def test_another_width():
    with pytest.raises(ValueError, match=r"built for 8 channels on axis -1; got an input of shape \(2, 3, 7\)"):
        BatchNorm(WIDTH)(torch.randn(2, 3, 7))
