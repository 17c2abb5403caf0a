import pytest
import torch
from torch import nn

from trainkit.norm_layer.group import GroupNorm

from .stateful import WIDTH, data, float64, train  # noqa: F401


def pair(groups: int, axis: int) -> tuple[GroupNorm, nn.GroupNorm]:
    ours, torchs = GroupNorm(WIDTH, groups=groups, axis=axis), nn.GroupNorm(groups, WIDTH)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), torchs.parameters(), strict=True):
            q.copy_(p.copy_(torch.randn_like(p)))
    return ours, torchs


@pytest.mark.parametrize("groups", [1, 2, WIDTH])
def test_images_as_torch(groups):
    ours, torchs = pair(groups, axis=1)
    (x, gy), *_ = data(1, 2, WIDTH, 3, 4)
    for a, b in zip(train(ours, x, gy), train(torchs, x, gy), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_tokens_one_by_one(groups):
    ours, torchs = pair(groups, axis=-1)
    (x, gy), *_ = data(1)
    for a, b in zip(train(ours, x, gy), train(torchs, x.view(-1, WIDTH), gy.view(-1, WIDTH)), strict=True):
        assert torch.allclose(a.view(-1, WIDTH), b, rtol=1e-12)


def test_no_future_in_tokens():
    norm, x = GroupNorm(WIDTH, groups=2), torch.randn(2, 4, WIDTH)
    other = torch.cat([x[:, :-1], 2 * x[:, -1:]], 1)
    assert not norm.leaks
    assert torch.equal(norm(x)[:, :-1], norm(other)[:, :-1])


def test_one_token_and_none():
    norm = GroupNorm(WIDTH, groups=WIDTH)
    assert torch.allclose(norm(torch.randn(1, 1, WIDTH)), torch.zeros(WIDTH), atol=1e-12)  # a group of one channel
    assert norm(torch.randn(0, 3, WIDTH)).shape == (0, 3, WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1, -1])
def test_compiled(axis):
    torch._dynamo.reset()
    norm = GroupNorm(WIDTH, groups=2, axis=axis)
    (x, gy), *_ = data(1, 2, WIDTH, 3, WIDTH)
    expected, actual = train(norm, x, gy), train(torch.compile(norm, backend="aot_eager", fullgraph=True), x, gy)
    for a, b in zip(actual, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_half_precision():
    norm, x = GroupNorm(WIDTH, groups=2), 1000 * torch.randn(2, 3, WIDTH)
    y = norm.float()(x.half())
    assert y.dtype == torch.float16
    assert torch.allclose(y.double(), norm.double()(x.half().double()), atol=2e-3)


@pytest.mark.parametrize("groups", [0, 3, 16])
def test_groups_that_do_not_divide_the_width(groups):
    with pytest.raises(ValueError, match=f"norm_layer.groups must divide the width 8; got {groups}"):
        GroupNorm(WIDTH, groups=groups)
