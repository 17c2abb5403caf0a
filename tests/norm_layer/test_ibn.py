import pytest
import torch
from torch import nn

from trainkit.norm_layer.ibn import IBN

from .stateful import WIDTH, data, float64, same, state, train  # noqa: F401

IMAGES = (3, WIDTH, 4, 5)


@pytest.mark.parametrize(("ratio", "first"), [(0.5, 4), (0.3, 2), (0.9, 7)])
def test_the_first_channels_by_instance_the_others_by_batch(ratio, first):
    layer = IBN(WIDTH, axis=1, ratio=ratio, eps=1e-3, momentum=0.3)
    instance, batch = nn.InstanceNorm2d(first, eps=1e-3, affine=True), nn.BatchNorm2d(WIDTH - first, 1e-3, 0.3)
    with torch.no_grad():
        ours = [*layer.instance.parameters(), *layer.batch.parameters()]
        for p, q in zip(ours, [*instance.parameters(), *batch.parameters()], strict=True):
            q.copy_(p.add_(0.3 * torch.randn_like(p)))
    for x, gy in data(3, *IMAGES):
        h = x.clone().requires_grad_()
        expected = torch.cat([instance(h[:, :first]), batch(h[:, first:])], 1)
        expected.backward(gy)
        y, gx = train(layer, x, gy)
        assert torch.allclose(y, expected, rtol=1e-12)
        assert torch.allclose(gx, h.grad, rtol=1e-9, atol=1e-12)
        assert same(state(layer.batch), state(batch), rtol=1e-12)
    x = torch.randn(IMAGES)
    expected = torch.cat([instance(x[:, :first]), batch.eval()(x[:, first:])], 1)
    assert torch.allclose(layer.eval()(x), expected, rtol=1e-12)


def test_the_first_half_is_blind_to_contrast_and_brightness():
    layer, x = IBN(WIDTH, axis=1, eps=0.0).eval(), torch.randn(IMAGES)
    contrast, brightness = torch.tensor([1.0, 3.0, 0.2]).view(3, 1, 1, 1), torch.randn(3, 1, 1, 1)
    y, z = layer(x), layer(contrast * x + brightness)
    assert torch.allclose(y[:, :4], z[:, :4], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(y[1:, 4:], z[1:, 4:])


def test_samples_may_change_places():
    layer, x, order = IBN(WIDTH, axis=1), torch.randn(IMAGES), [2, 0, 1]
    assert torch.allclose(layer(x[order]), layer(x)[order], rtol=1e-12)


@pytest.mark.parametrize(("width", "ratio"), [(1, 0.5), (WIDTH, 0.0), (WIDTH, 1.0)])
def test_a_half_without_channels(width, ratio):
    with pytest.raises(ValueError, match="needs channels for both of its halves"):
        IBN(width, ratio=ratio)


def test_another_number_of_channels():
    with pytest.raises(ValueError, match="built for 8 channels on axis 1"):
        IBN(WIDTH, axis=1)(torch.randn(2, 9, 3, 3))
