import pytest
import torch
from torch import nn

from trainkit.norm_layer.rep_batch import RepBN

from .stateful import WIDTH, data, float64, train  # noqa: F401


def test_batch_norm_and_a_share_of_the_input():
    norm, bn = RepBN(WIDTH, eps=1e-3, momentum=0.3, count="call"), nn.BatchNorm1d(WIDTH, eps=1e-3, momentum=0.3)
    with torch.no_grad():
        norm.alpha.fill_(0.7)
    for x, gy in data(3):
        h = x.clone().requires_grad_()
        expected = bn(h.flatten(0, 1)).view_as(h) + 0.7 * h
        expected.backward(gy)
        norm.zero_grad()
        y, gx = train(norm, x, gy)
        assert torch.allclose(y, expected, rtol=1e-12)
        assert torch.allclose(gx, h.grad, rtol=1e-9, atol=1e-12)
        assert torch.allclose(norm.alpha.grad, (x * gy).sum(), rtol=1e-12)
    x = torch.randn(2, 3, WIDTH)
    expected = bn.eval()(x.flatten(0, 1)).view_as(x) + 0.7 * x
    assert torch.allclose(norm.eval()(x), expected, rtol=1e-12)


def test_folds_into_the_next_linear_layer():
    norm, linear = RepBN(WIDTH, count="call"), nn.Linear(WIDTH, 4)
    for x, gy in data(3):
        train(norm, x, gy)
    norm.eval()
    a, c = norm.scale_shift()
    folded = nn.Linear(WIDTH, 4)
    with torch.no_grad():
        folded.weight.copy_(linear.weight * a)
        folded.bias.copy_(linear.bias + linear.weight @ c)
        x = torch.randn(2, 3, WIDTH)
        assert torch.allclose(folded(x), linear(norm(x)), rtol=1e-10)


def test_padding_passes_by_the_batch_norm():
    norm, pad, x = RepBN(WIDTH), torch.tensor([[False, False, True]]), torch.randn(1, 3, WIDTH)
    assert torch.allclose(norm(x, pad_mask=pad)[pad], (2 * x)[pad])
    assert torch.allclose(norm.eval()(x, pad_mask=pad)[pad], (2 * x)[pad])


def test_initial_values():
    x = torch.randn(2, 3, WIDTH)
    assert not RepBN(WIDTH, init="llama")(x).any()
    assert torch.allclose(RepBN(WIDTH)(x) - x, nn.BatchNorm1d(WIDTH)(x.flatten(0, 1)).view_as(x))
    with pytest.raises(ValueError, match="init is vision or llama; got 'zero'"):
        RepBN(WIDTH, init="zero")
