"""Region normalization: each side of a mask by its own statistics."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit.model.parts.region_norm import LearnedRegionNorm, RegionNorm, by_region


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def expected_regions(x, mask, eps):
    """As the released code has it: the other region holds the mean, and batch norm runs over all positions."""
    y = torch.zeros_like(x)
    for region in (mask, 1 - mask):
        size = region.sum()
        if size == 0:
            continue
        mean = (x * region).sum((0, 2, 3), keepdim=True) / size
        filled = x * region + (1 - region) * mean
        whole = F.batch_norm(filled, None, None, training=True, eps=eps)
        y = y + whole * (size / region.numel()).sqrt() * region
    return y


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_values_and_gradients_as_by_filling_the_other_region(share):
    x, mask = 2 + 3 * torch.randn(3, 4, 5, 5), (torch.rand(3, 1, 5, 5) < share).double()
    inputs, gy = [x.clone().requires_grad_() for _ in range(2)], torch.randn(x.shape)
    expected, y = expected_regions(inputs[0], mask, 1e-2), by_region(inputs[1], mask.bool(), 1e-2)
    expected.backward(gy)
    y.backward(gy)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(inputs[1].grad, inputs[0].grad, rtol=1e-8, atol=1e-11)


def test_a_full_mask_is_batch_norm_and_regions_have_mean_0_and_variance_1():
    x = 2 + 3 * torch.randn(3, 4, 6, 6)
    full = torch.ones(3, 1, 6, 6, dtype=torch.bool)
    assert torch.allclose(by_region(x, full, 1e-5), nn.BatchNorm2d(4)(x), rtol=1e-9, atol=1e-12)
    mask = torch.rand(3, 1, 6, 6) < 0.4
    y = by_region(x, mask, 1e-9).transpose(0, 1).flatten(1)
    for region in (mask, ~mask):
        part = y[:, region.flatten()]
        assert torch.allclose(part.mean(1), torch.zeros(4), atol=1e-9)
        assert torch.allclose(part.var(1, correction=0), torch.ones(4), rtol=1e-6)


def test_basic():
    norm = RegionNorm(4, eps=1e-2)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn_like(p))
    front, front_shift, back, back_shift = (p.view(-1, 1, 1) for p in norm.parameters())
    x, mask = torch.randn(3, 4, 5, 5), (torch.rand(3, 1, 10, 10) < 0.5).double()
    m = mask[:, :, ::2, ::2]
    y = expected_regions(x, m, 1e-2)
    expected = m * y * (1 + front) + (1 - m) * y * (1 + back) + front_shift + back_shift
    assert torch.allclose(norm(x, mask), expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(norm.eval()(x, mask), norm.train()(x, mask))
    assert torch.equal(norm(x, mask[:1]), norm(x, mask[:1].expand(3, -1, -1, -1)))
    assert not norm.state_dict().keys() - dict(norm.named_parameters()).keys()


def test_learned():
    norm = LearnedRegionNorm(kernel=3, threshold=0.5, eps=1e-2)
    x = torch.randn(3, 4, 5, 5)
    pooled = torch.stack([x.mean(1), x.amax(1)], 1)
    attention = 1 / (1 + torch.exp(-F.conv2d(pooled, norm.attend.weight, padding=1)))
    assert 0 < (attention >= 0.5).double().mean() < 1
    y = expected_regions(x, (attention >= 0.5).double(), 1e-2)
    gain, shift = (F.conv2d(attention, c.weight, c.bias, padding=1) for c in (norm.gamma, norm.beta))
    assert torch.allclose(norm(x), y * (1 + gain) + shift, rtol=1e-10, atol=1e-12)
    norm(x).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in norm.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_stays(dtype):
    x = torch.randn(2, 4, 5, 5).to(dtype)
    y = RegionNorm(4).to(dtype)(x, torch.rand(2, 1, 5, 5) < 0.5)
    z = LearnedRegionNorm(threshold=0.5).to(dtype)(x)
    assert y.dtype == z.dtype == dtype
    assert y.isfinite().all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"got \(2, 4, 5, 5\) and \(2, 5, 5\)"):
        RegionNorm(4)(torch.randn(2, 4, 5, 5), torch.ones(2, 5, 5))
    with pytest.raises(ValueError, match=r"kernel must be odd.*got 4"):
        LearnedRegionNorm(kernel=4)
    with pytest.raises(ValueError, match=r"needs images \(B, C, H, W\); got \(2, 5, 4\)"):
        LearnedRegionNorm()(torch.randn(2, 5, 4))
