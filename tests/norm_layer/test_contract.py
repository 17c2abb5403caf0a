"""What every norm layer of the menu keeps to: the shape, the dtype, its state, and finite gradients."""

import warnings

import pytest
import torch
from torch import nn

from trainkit.launch.compose import compose
from trainkit.launch.job import make

from ..menu import options

WIDTH = 32


@pytest.fixture(scope="module")
def factories():
    return {name: make(compose([f"norm_layer={name}"]), "norm_layer") for name in options("norm_layer")}


@pytest.fixture(autouse=True)
def quiet():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def built(factories, name, **settings) -> nn.Module:
    return factories[name](WIDTH, **settings)


names = pytest.mark.parametrize("name", options("norm_layer"))


@names
@pytest.mark.parametrize(("shape", "axis"), [((4, 5, WIDTH), -1), ((2, 3, 4, WIDTH), -1), ((3, WIDTH, 4, 5), 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype_stay_and_gradients_are_finite(factories, name, shape, axis, dtype):
    layer = built(factories, name, axis=axis).to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    for _ in range(2):
        y = layer(x)
        y.square().sum().backward()
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert x.grad.isfinite().all()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.dtype == dtype


@names
def test_the_axis_is_where_the_channels_are(factories, name):
    if name == "group":
        pytest.skip("its axis tells images from tokens")
    x = torch.randn(3, 4, 5, WIDTH, dtype=torch.float64)
    last, first = (built(factories, name, axis=axis).double() for axis in (-1, 1))
    first.load_state_dict(last.state_dict())
    torch.testing.assert_close(first(x.movedim(-1, 1)), last(x).movedim(-1, 1), rtol=1e-12, atol=1e-12)


@names
def test_state_goes_into_a_file_and_back(factories, name):
    layer, other = built(factories, name), built(factories, name)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += torch.randn_like(parameter)
    x = torch.randn(4, 6, WIDTH, requires_grad=True)
    layer(x).sum().backward()
    other.load_state_dict(layer.state_dict())
    layer.eval()
    other.eval()
    torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


@names
@pytest.mark.parametrize("training", [True, False])
def test_nan_is_never_hidden(factories, name, training):
    layer = built(factories, name).train(training)
    x = torch.randn(4, 6, WIDTH)
    x[1, 2, 3] = float("nan")
    assert layer(x)[1, 2].isnan().any()


@names
def test_no_tokens_give_no_tokens(factories, name):
    layer = built(factories, name)
    x = torch.randn(0, 6, WIDTH, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert all(p.grad is None or (p.grad == 0).all() for p in layer.parameters())


@names
def test_large_half_precision_does_not_overflow_inside(factories, name):
    if name in ("none", "dyt"):
        pytest.skip("no statistic")
    layer = built(factories, name).half()
    x = (torch.randn(8, 16, WIDTH) * 2000).half()  # its squares are beyond 65504
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("name", [name for name in options("norm_layer") if name != "none"])
def test_a_layer_has_a_channel_at_least(factories, name):
    with pytest.raises(ValueError, match="needs at least 1 channel; got width 0"):
        factories[name](0)
