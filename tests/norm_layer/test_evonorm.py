"""EvoNorm B0, S0 and S0a: the formulas, what they depend on, and where no activation follows."""

import copy
import warnings

import pytest
import torch

from trainkit.norm_layer.evonorm_b0 import EvoNormB0
from trainkit.norm_layer.evonorm_s0 import EvoNormS0
from trainkit.norm_layer.evonorm_s0a import EvoNormS0a
from trainkit.norm_layer.stateful import advance

from .stateful import WIDTH, data, float64, same, state, train  # noqa: F401

IMAGES = (4, WIDTH, 3, 5)


def moved(layer):
    """The layer with parameters away from their start."""
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    return layer


def per_channel(p):
    return p.view(-1, 1, 1)


def b0(layer, x, var):
    """The paper's equation, with the batch's variance given."""
    left = (per_channel(var) + layer.eps).sqrt()
    mean = x.mean((2, 3), keepdim=True)
    right = per_channel(layer.v) * x + (((x - mean) ** 2).mean((2, 3), keepdim=True) + layer.eps).sqrt()
    return per_channel(layer.gain) * x / torch.where(left > right, left, right) + per_channel(layer.bias)


def batch_variance(x):
    flat = x.transpose(0, 1).flatten(1)
    return (flat - flat.mean(1, keepdim=True)).square().sum(1) / flat.shape[1]


def test_b0_is_the_formula_and_its_running_variance_unbiased():
    layer = moved(EvoNormB0(WIDTH, axis=1, momentum=0.3, eps=1e-2))
    running = torch.ones(WIDTH)
    for x, gy in data(3, *IMAGES):
        h = x.clone().requires_grad_()
        expected = b0(layer, h, batch_variance(h))
        wanted = torch.autograd.grad(expected, [h, layer.gain, layer.bias, layer.v], gy)
        layer.zero_grad()
        y, gx = train(layer, x, gy)
        assert torch.allclose(y, expected, rtol=1e-12)
        for found, g in zip((gx, layer.gain.grad, layer.bias.grad, layer.v.grad), wanted, strict=True):
            assert torch.allclose(found, g, rtol=1e-9, atol=1e-12)
        running = 0.7 * running + 0.3 * batch_variance(x) * 60 / 59
        assert torch.allclose(layer.running_var, running, rtol=1e-12)
    x = torch.randn(IMAGES)
    assert torch.allclose(layer.eval()(x), b0(layer, x, running), rtol=1e-12)
    assert torch.allclose(layer.running_var, running, rtol=1e-12)  # eval left it alone


def test_b0_sees_other_samples_in_training_alone():
    layer, x = EvoNormB0(WIDTH, axis=1, count="step"), torch.randn(IMAGES)
    assert not torch.allclose(layer(x)[:1], layer(x[:1]))
    layer.eval()
    assert torch.allclose(layer(x)[:1], layer(x[:1]), rtol=1e-12)


def test_b0_counts_steps_over_micro_batches():
    layer, whole = EvoNormB0(WIDTH, axis=1, count="step"), EvoNormB0(WIDTH, axis=1, count="step")
    (x, gy), *_ = data(1, *IMAGES)
    for half, g in zip(x.chunk(2), gy.chunk(2), strict=True):
        train(layer, half, g)
        assert torch.equal(layer.running_var, torch.ones(WIDTH))
    advance(layer)
    variances = [half.transpose(0, 1).flatten(1).var(1) for half in x.chunk(2)]
    assert torch.allclose(layer.running_var, 0.9 + 0.1 * (variances[0] + variances[1]) / 2, rtol=1e-12)
    train(whole, x, gy)
    advance(whole)
    assert torch.allclose(whole.running_var, 0.9 + 0.1 * x.transpose(0, 1).flatten(1).var(1), rtol=1e-12)


def test_b0_repeats_a_checkpointed_forward_without_a_second_update():
    plain = moved(EvoNormB0(WIDTH, axis=1, count="call"))
    twin = copy.deepcopy(plain)
    (x, gy), *_ = data(1, *IMAGES)
    expected = train(plain, x, gy)
    h = x.clone().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(twin, h, use_reentrant=False)
    y.backward(gy)
    assert torch.allclose(y, expected[0], rtol=1e-12)
    assert torch.allclose(h.grad, expected[1], rtol=1e-12)
    assert same(state(plain), state(twin), rtol=0, atol=0)


def test_b0_of_a_single_position_takes_the_running_variance():
    layer = EvoNormB0(WIDTH, axis=1)
    layer.running_var.fill_(4.0)
    y, gx = train(layer, torch.randn(1, WIDTH, 1, 1), torch.randn(1, WIDTH, 1, 1))
    assert y.isfinite().all()
    assert gx.isfinite().all()
    assert torch.equal(layer.running_var, torch.full((WIDTH,), 4.0))


@pytest.mark.parametrize("kind", [EvoNormS0, EvoNormS0a])
@pytest.mark.parametrize("activation", [True, False])
def test_s0_is_the_formula(kind, activation):
    layer = moved(kind(WIDTH, axis=1, groups=2, eps=1e-2, activation=activation))
    (x, gy), *_ = data(1, *IMAGES)
    h = x.clone().requires_grad_()
    groups = h.reshape(4, 2, -1)
    deviation = ((groups - groups.mean(2, keepdim=True)).square().mean(2) + 1e-2).sqrt()
    deviation = deviation.repeat_interleave(WIDTH // 2, 1)[:, :, None, None]
    if activation:
        z = h / (1 + torch.exp(-per_channel(layer.v) * h)) / deviation
    else:
        z = h / deviation if kind is EvoNormS0a else h
    expected = per_channel(layer.gain) * z + per_channel(layer.bias)
    wanted = torch.autograd.grad(expected, [h, *layer.parameters()], gy)
    y, gx = train(layer, x, gy)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-14)
    for found, g in zip((gx, *(p.grad for p in layer.parameters())), wanted, strict=True):
        assert torch.allclose(found, g, rtol=1e-9, atol=1e-12)
    assert torch.equal(layer.eval()(x), y)
    assert torch.allclose(layer(x)[:1], layer(x[:1]), rtol=1e-12)


def test_s0_is_not_blind_to_scale():
    layer, x = EvoNormS0(WIDTH, axis=1, groups=2, eps=0.0), torch.randn(IMAGES)
    assert not torch.allclose(layer(3 * x), layer(x), rtol=1e-3)


def test_b0_without_activation_is_affine_and_observes_nothing():
    layer = moved(EvoNormB0(WIDTH, axis=1, activation=False))
    x = torch.randn(IMAGES)
    assert torch.allclose(layer(x), per_channel(layer.gain) * x + per_channel(layer.bias), rtol=1e-12)
    assert torch.equal(layer.running_var, torch.ones(WIDTH))


@pytest.mark.parametrize("kind", [EvoNormB0, EvoNormS0, EvoNormS0a])
def test_a_layer_says_whether_it_activates_and_can_be_told_not_to(kind):
    groups = {} if kind is EvoNormB0 else {"groups": 4}
    layer, other = kind(WIDTH, **groups), moved(kind(WIDTH, activation=False, **groups))
    assert layer.activates
    assert not other.activates
    layer.deactivate()
    assert not layer.activates
    assert layer.state_dict().keys() == other.state_dict().keys()
    layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, WIDTH)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("kind", [EvoNormB0, EvoNormS0, EvoNormS0a])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind, dtype):
    layer = moved(kind(WIDTH, axis=1, **({} if kind is EvoNormB0 else {"groups": 4})))
    x = (1000 * torch.randn(IMAGES)).to(dtype)  # squares exceed float16's 65504
    y = copy.deepcopy(layer).float()(x)
    assert y.dtype == dtype
    assert torch.allclose(y.double(), layer(x.double()), rtol=0.02, atol=0.02)


def test_resume():
    unbroken = moved(EvoNormB0(WIDTH, axis=1, count="step"))
    batches = data(4, *IMAGES)
    for x, gy in batches[:2]:
        train(unbroken, x, gy)
        advance(unbroken)
    resumed = EvoNormB0(WIDTH, axis=1, count="step")
    resumed.load_state_dict(unbroken.state_dict())
    for x, gy in batches[2:]:
        for layer in (unbroken, resumed):
            train(layer, x, gy)
            advance(layer)
    assert same(state(resumed), state(unbroken), rtol=0, atol=0)


def test_bad_input():
    with pytest.raises(ValueError, match=r"norm_layer.groups must divide the width 8; got 3"):
        EvoNormS0(WIDTH, groups=3)
    with pytest.raises(ValueError, match=r"norm_layer.count is step or call; got 'epoch'"):
        EvoNormB0(WIDTH, count="epoch")
    with pytest.raises(ValueError, match=r"built for samples of 8 channels on axis 1; got .*\(2, 3, 8\)"):
        EvoNormS0(WIDTH, groups=2, axis=1)(torch.randn(2, 3, WIDTH))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EvoNormB0, EvoNormS0, EvoNormS0a])
def test_compiled(kind):
    torch._dynamo.reset()
    eager = moved(kind(WIDTH, axis=1, **({"count": "step"} if kind is EvoNormB0 else {"groups": 4})))
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x, gy in data(2, *IMAGES):
            expected, actual = train(eager, x, gy), train(compiled, x, gy)
            advance(eager)
            advance(traced)
            for a, b in zip(actual, expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert same(state(eager), state(traced), rtol=1e-12)
