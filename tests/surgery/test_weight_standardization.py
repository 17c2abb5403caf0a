"""Kernels that are standardized in every forward: the formulas, what they are blind to, and the conversion."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit.model.parts.standardized_conv import ScaledStandardizedConv2d, StandardizedConv2d
from trainkit.surgery import weight_standardization
from trainkit.surgery.weight_standardization import scaled_standardize_weights, standardize_weights

FORMS = ["bcn", "readme", "bit"]


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def expected_kernel(w, form, eps):
    """The table of the papers, filter by filter."""
    rows = []
    for row in w.flatten(1):
        centred = row - row.sum() / len(row)
        unbiased = centred.square().sum() / (len(row) - 1)
        biased = centred.square().sum() / len(row)
        below = {"bcn": (unbiased + eps) ** 0.5, "readme": unbiased**0.5 + eps, "bit": (biased + eps) ** 0.5}[form]
        rows.append(centred / below)
    return torch.stack(rows).view_as(w)


def conv(**settings):
    return nn.Conv2d(4, 6, 3, **{"padding": 1, **settings})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [{}, {"groups": 2, "stride": 2, "bias": False}, {"padding_mode": "circular"}])
def test_the_convolution_by_a_standardized_kernel(form, settings):
    plain = conv(**settings)
    with torch.no_grad():
        kernel = expected_kernel(plain.weight, form, 1e-2)
    reference = conv(**settings)
    reference.load_state_dict(plain.state_dict())
    reference.weight.data.copy_(kernel)
    x = torch.randn(2, 4, 5, 5)
    standardized = standardize_weights(plain, form=form, eps=1e-2)
    assert torch.allclose(standardized(x), reference(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_a_filter_is_centred_and_orthogonal(form):
    layer = standardize_weights(conv(), form=form, eps=0.0)
    x = torch.randn(2, 4, 5, 5)
    layer(x).mul(torch.randn(2, 6, 5, 5)).sum().backward()
    g, w = layer.weight.grad.flatten(1), layer.weight.detach().flatten(1)
    assert g.norm(dim=1).min() > 1e-3
    assert torch.allclose(g.sum(1), torch.zeros(6), atol=1e-10)
    assert torch.allclose((g * (w - w.mean(1, keepdim=True))).sum(1), torch.zeros(6), atol=1e-10)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(6, 1, 1, 1) + 0.5).add_(torch.randn(6, 1, 1, 1))
    assert torch.allclose(layer(x), before, rtol=1e-9, atol=1e-11)
    assert torch.allclose(layer.standardized().flatten(1).sum(1), torch.zeros(6), atol=1e-10)


def test_scaled_kernels_have_a_norm_of_gain_times_gamma():
    plain = conv(groups=2)
    kernel = expected_kernel(plain.weight.detach(), "bit", 1e-3)
    layer = scaled_standardize_weights(plain, gamma=1.7, eps=1e-3)
    with torch.no_grad():
        layer.gain.copy_(torch.rand(6, 1, 1, 1) + 0.5)
    x = torch.randn(2, 4, 5, 5)
    expected = F.conv2d(x, layer.gain * 1.7 / 18**0.5 * kernel, layer.bias, padding=1, groups=2)
    assert torch.allclose(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_a_model_keeps_its_names_and_its_parameters():
    model = nn.Sequential(conv(), nn.BatchNorm2d(6), nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU()), nn.Conv2d(6, 2, 1))
    keys, parameters = list(model.state_dict()), list(model.parameters())
    twice = standardize_weights(model, keep=["3"])
    assert twice is model
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [type(m) for m in (model[0], model[2][0], model[3])] == [StandardizedConv2d, StandardizedConv2d, nn.Conv2d]
    assert "form=bcn" in repr(model)
    model(torch.randn(2, 4, 6, 6)).sum().backward()


def test_the_scaled_form_adds_gains():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Conv2d(6, 6, 3)).float()
    scaled_standardize_weights(model, gamma=1.7)
    assert {name for name, _ in model.named_parameters() if name.endswith("gain")} == {"0.gain", "2.gain"}
    assert model[0].gain.dtype == torch.float32
    assert type(model[2]) is ScaledStandardizedConv2d


def test_scaled_kernels_keep_the_variance_behind_relu():
    layer = nn.Conv2d(64, 64, 3, bias=False)
    layer.weight.data.add_(1)  # which the standardization takes away
    layer = scaled_standardize_weights(layer)
    relu = torch.randn(16, 64, 8, 8).relu()
    assert layer(relu).var().item() == pytest.approx(1.0, rel=0.1)


def test_half_precision():
    layer = standardize_weights(conv()).bfloat16()
    layer.weight.data.mul_(1e3)
    kernel = layer.standardized()
    assert kernel.dtype == torch.bfloat16
    assert torch.allclose(kernel.double(), expected_kernel(layer.weight.detach().double(), "bcn", 1e-5), atol=0.02)


@pytest.mark.parametrize(
    ("model", "settings", "says"),
    [
        (nn.Linear(2, 2), {}, "needs a Conv2d to convert; the model has none"),
        (nn.Sequential(nn.Conv2d(2, 2, 3)), {"form": "std"}, "form is one of bcn, readme, bit; got 'std'"),
        (nn.Sequential(nn.Conv2d(2, 2, 3)), {"keep": ["head"]}, "keep names a Conv2d that the model lacks: head"),
        (nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), {}, r"0 has 1, which is its own mean.*keep=\['0'\]"),
    ],
)
def test_bad_input(model, settings, says):
    with pytest.raises(ValueError, match=says):
        weight_standardization.standardize_weights(model, **settings)
    assert not any(isinstance(module, StandardizedConv2d) for module in model.modules())
