import pytest
import torch
from torch import nn

from trainkit.norm_layer.instance import InstanceNorm

from .stateful import WIDTH, data, float64, train  # noqa: F401


@pytest.mark.parametrize("affine", [True, False])
def test_images_as_torch(affine):
    ours, torchs = InstanceNorm(WIDTH, axis=1, affine=affine), nn.InstanceNorm2d(WIDTH, affine=affine)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            q.copy_(p.copy_(torch.randn_like(p)))
    (x, gy), *_ = data(1, 2, WIDTH, 3, 4)
    for a, b in zip(train(ours, x, gy), train(torchs, x, gy), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_tokens():
    norm, x = InstanceNorm(WIDTH), 3 + 2 * torch.randn(2, 5, WIDTH)
    y = norm(x)
    assert torch.allclose(y.mean(1), torch.zeros(2, WIDTH), atol=1e-12)
    assert torch.allclose(y.var(1, unbiased=False), torch.ones(2, WIDTH), rtol=1e-4)
    assert torch.allclose(y[:1], norm(x[:1]))  # the other samples have no part in it


def test_leaks_the_future_in_eval_too():
    norm, x = InstanceNorm(WIDTH).eval(), torch.randn(2, 4, WIDTH)
    other = torch.cat([x[:, :-1], 2 * x[:, -1:]], 1)
    assert norm.leaks
    assert not torch.allclose(norm(x)[:, 0], norm(other)[:, 0])


def test_one_position_gives_the_bias():
    assert torch.allclose(InstanceNorm(WIDTH)(torch.randn(1, 1, WIDTH)), torch.zeros(WIDTH), atol=1e-12)


def test_without_positions():
    with pytest.raises(ValueError, match="norm_layer=instance averages over positions"):
        InstanceNorm(WIDTH)(torch.randn(4, WIDTH))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("affine", [True, False])
def test_compiled(axis, affine):
    torch._dynamo.reset()
    norm = InstanceNorm(WIDTH, axis=axis, affine=affine)
    (x, gy), *_ = data(1, 2, WIDTH, 3, WIDTH)
    expected, actual = train(norm, x, gy), train(torch.compile(norm, backend="aot_eager", fullgraph=True), x, gy)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
