"""Norm layers that see each row alone, against their equations written out here in float64."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from trainkit.norm_layer import rowwise
from trainkit.norm_layer.crms import CRMSNorm
from trainkit.norm_layer.dyt import DynamicTanh
from trainkit.norm_layer.gated import GatedNorm
from trainkit.norm_layer.l1 import L1Norm
from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.pre_affine import PreAffineRMSNorm
from trainkit.norm_layer.rms import RMSNorm
from trainkit.norm_layer.seed import SeeDNorm
from trainkit.norm_layer.srms import SimpleRMSNorm

WIDTH = 8


def rms(x: Tensor, eps: float) -> Tensor:
    return x / ((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def layer_equation(x, p):
    centred = x - x.sum(-1, keepdim=True) / WIDTH
    return p["gain"] * centred / ((centred**2).sum(-1, keepdim=True) / WIDTH + 1e-5).sqrt() + p["bias"]


def crms_equation(x, p):
    full = torch.cat([x, -x.sum(-1, keepdim=True)], -1)
    return rms(full, 1e-5)[..., :-1]


def l1_equation(x, p, constant=1.0):
    centred = x - x.sum(-1, keepdim=True) / WIDTH
    return p["gain"] * centred / (constant * centred.abs().sum(-1, keepdim=True) / WIDTH + 1e-6) + p["bias"]


def dyt_equation(x, p):
    e = torch.exp(2 * p["alpha"] * x)
    return p["gain"] * (e - 1) / (e + 1) + p.get("bias", 0)


def seed_equation(x, p, heads=1):
    slices = []
    for xs, alpha, beta in zip(*(t.chunk(heads, -1) for t in (x, p["alpha"], p["beta"])), strict=True):
        slices.append(torch.tanh((xs * beta).sum(-1, keepdim=True)) * alpha)
    return (torch.cat(slices, -1) + p["gain"]) * rms(x, 1e-6)


def gated_equation(x, p):
    z = p["gain"] * rms(x, 1e-6)
    hidden = z @ p["down"]
    return z / (1 + torch.exp(-(hidden / (1 + torch.exp(-hidden))) @ p["up"]))


CASES = {
    "layer": (LayerNorm, layer_equation),
    "rms": (RMSNorm, lambda x, p: p["gain"] * rms(x, 1e-6)),
    "srms": (SimpleRMSNorm, lambda x, p: rms(x, 1e-6)),
    "crms": (CRMSNorm, crms_equation),
    "l1": (L1Norm, l1_equation),
    "l1_constant": (
        lambda width, **k: L1Norm(width, constant=1.5, **k),
        lambda x, p: l1_equation(x, p, constant=1.5),
    ),
    "dyt": (DynamicTanh, dyt_equation),
    "dyt_without_bias": (lambda width, **k: DynamicTanh(width, bias=False, **k), dyt_equation),
    "seed": (SeeDNorm, seed_equation),
    "seed_heads": (lambda width, **k: SeeDNorm(width, heads=4, **k), lambda x, p: seed_equation(x, p, heads=4)),
    "gated": (lambda width, **k: GatedNorm(width, rank=3, **k), gated_equation),
    "pre_affine": (PreAffineRMSNorm, lambda x, p: p["gain"] * rms(p["pre_gain"] * x, 1e-6)),
}
cases = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name: str, dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    """A layer whose parameters are not at their starting values."""
    layer = CASES[name][0](WIDTH, **settings).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.5 * torch.randn_like(parameter)
    return layer


def gradients(y: Tensor, x: Tensor, layer: nn.Module, gy: Tensor, **settings) -> list[Tensor]:
    return list(torch.autograd.grad(y, [x, *layer.parameters()], gy, **settings))


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    assert (actual - expected).abs().max() <= rtol * expected.abs().max() + 1e-15


@cases
def test_the_equation_and_its_gradients(name):
    layer, equation = make(name), CASES[name][1]
    x, gy = torch.randn(2, 5, WIDTH, dtype=torch.float64).requires_grad_(), torch.randn(2, 5, WIDTH).double()
    y, expected = layer(x), equation(x, dict(layer.named_parameters()))
    close(y, expected)
    for a, b in zip(gradients(y, x, layer, gy), gradients(expected, x, layer, gy), strict=True):
        close(a, b)


@cases
def test_gradients_of_gradients(name):
    layer = make(name)
    parameters = dict(layer.named_parameters())

    def function(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    inputs = (torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True), *parameters.values())
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@cases
def test_gradients_per_sample(name):
    layer = make(name)
    parameters = dict(layer.named_parameters())
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)

    def loss(values, sample):
        return torch.func.functional_call(layer, values, (sample,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        wanted = list(parameters.values())
        if wanted:
            expected = torch.autograd.grad(layer(sample).square().sum(), wanted)
            for parameter_name, gradient in zip(parameters, expected, strict=True):
                close(found[parameter_name][i], gradient)


@cases
def test_blocks_of_any_size_give_the_same_numbers(name, monkeypatch):
    layer = make(name)
    x, gy = torch.randn(7, 3, WIDTH, dtype=torch.float64).requires_grad_(), torch.randn(7, 3, WIDTH).double()
    y = layer(x)
    expected = [y, *gradients(y, x, layer, gy)]
    monkeypatch.setattr(rowwise, "BLOCK", 4 * WIDTH)
    y = layer(x)
    for a, b in zip([y, *gradients(y, x, layer, gy)], expected, strict=True):
        close(a, b)


@cases
def test_only_the_input_is_kept(name):
    layer, kept = make(name, torch.float32), {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(64, 64, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(kept.values()) <= 1.3 * x.nbytes  # LayerNorm: x and two numbers per row, of eight channels


@cases
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_rounded_once(name, dtype, rtol):
    """Statistics in float32: y is the exact one, to half a unit in the last place of the half-precision dtype."""
    layer, exact = make(name, dtype), make(name)
    exact.load_state_dict(layer.state_dict())
    x, gy = torch.randn(16, WIDTH).to(dtype).requires_grad_(), torch.randn(16, WIDTH).to(dtype)
    z = x.detach().double().requires_grad_()
    y, expected = layer(x), exact(z)
    assert y.dtype == dtype
    assert ((y.double() - expected).abs() <= 1.01 * rtol * expected.abs() + 1e-6).all()
    for a, b in zip(gradients(y, x, layer, gy), gradients(expected, z, exact, gy.double()), strict=True):
        assert a.dtype == dtype
        close(a.double(), b, rtol=4 * rtol)


@cases
def test_parameters_in_float32_serve_half_precision(name):
    layer = make(name, torch.float32)
    x = torch.randn(4, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@cases
def test_autocast_changes_neither_dtype_nor_precision(name):
    layer = make(name, torch.float32)
    x = torch.randn(6, WIDTH, requires_grad=True)
    expected = gradients(layer(x), x, layer, torch.ones_like(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        actual = gradients(y, x, layer, torch.ones_like(x))
    assert y.dtype == torch.float32
    for a, b in zip([y, *actual], [layer(x), *expected], strict=True):
        close(a, b, rtol=1e-6)


@cases
def test_an_input_that_is_a_slice_or_turned_around(name):
    layer = make(name)
    wide = torch.randn(3, 4, 2 * WIDTH, dtype=torch.float64)
    for x in (wide[..., :WIDTH], wide[..., WIDTH:].transpose(0, 1), torch.randn(WIDTH, 3).double().T):
        close(layer(x), layer(x.contiguous()))
    y = layer(x.requires_grad_())
    y.sum().backward()  # of a gradient without strides
    assert x.grad.shape == x.shape
    close(layer(x[0]), y[0])


@cases
def test_x_and_its_gradient_are_left_alone(name):
    layer = make(name)
    x, gy = torch.randn(5, WIDTH, dtype=torch.float64).requires_grad_(), torch.randn(5, WIDTH).double()
    before = x.detach().clone(), gy.clone()
    y = layer(x)
    gradients(y, x, layer, gy, retain_graph=True)
    assert torch.equal(x, before[0])
    assert torch.equal(gy, before[1])
    close(torch.autograd.grad(y, x, gy)[0], torch.autograd.grad(layer(x), x, gy)[0])


@cases
def test_another_number_of_channels_is_refused(name):
    with pytest.raises(ValueError, match=r"was built for 8 channels on axis -1; got an input of shape \(2, 16\)"):
        make(name)(torch.randn(2, 16).double())
    with pytest.raises(ValueError, match="on axis 3"):
        make(name, axis=3)(torch.randn(2, WIDTH).double())


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: RMSNorm(0), "at least 1 channel; got width 0"),
        (lambda: LayerNorm(8, eps=-1e-5), r"norm_layer.eps .* got -1e-05"),
        (lambda: SeeDNorm(8, heads=3), r"norm_layer.heads must divide the 8 channels; got 3"),
        (lambda: SeeDNorm(8, heads=0), r"norm_layer.heads must divide the 8 channels; got 0"),
        (lambda: GatedNorm(8, rank=0), r"norm_layer.rank .* at least 1; got 0"),
        (lambda: L1Norm(8, constant=0.0), r"norm_layer.constant .* positive; got 0"),
    ],
)
def test_bad_settings(build, says):
    with pytest.raises(ValueError, match=says):
        build()


@pytest.mark.slow
@cases
@pytest.mark.parametrize("rows", [(4, 32), (3, 5)])
def test_compiled_as_eager(name, rows):
    layer = make(name)
    x, gy = torch.randn(*rows, WIDTH, dtype=torch.float64).requires_grad_(), torch.randn(*rows, WIDTH).double()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = torch.compile(layer, fullgraph=True)(x)
        actual = [y, *gradients(y, x, layer, gy)]
    y = layer(x)
    for a, b in zip(actual, [y, *gradients(y, x, layer, gy)], strict=True):
        close(a, b)


@pytest.mark.gpu
@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_as_cpu(name, dtype):
    layer = make(name, dtype)
    x, gy = torch.randn(4, 32, WIDTH).to(dtype).requires_grad_(), torch.randn(4, 32, WIDTH).to(dtype)
    y = layer(x)
    expected = [y, *gradients(y, x, layer, gy)]
    there = x.detach().cuda().requires_grad_()
    layer.cuda()
    y = layer(there)
    for a, b in zip([y, *gradients(y, there, layer, gy.cuda())], expected, strict=True):
        assert a.dtype == dtype
        close(a.cpu().double(), b.double(), rtol=1e-5 if dtype == torch.float32 else 2**-6)


# What the papers claim


@pytest.mark.parametrize("name", ["layer", "l1"])
def test_blind_to_scale_and_shift(name):
    layer, x = make(name), torch.randn(5, WIDTH).double()
    layer.eps = 0.0
    close(layer(3 * x + 7), layer(x))


@pytest.mark.parametrize("name", ["rms", "srms", "crms", "pre_affine"])
def test_blind_to_scale(name):
    layer, x = make(name), torch.randn(5, WIDTH).double()
    layer.eps = 0.0
    close(layer(3 * x), layer(x))
    x.requires_grad_()
    (gx,) = torch.autograd.grad(layer(x), x, torch.randn_like(x))
    assert (gx * x).sum(-1).abs().max() < 1e-12


def test_l1_has_unit_mean_absolute_value():
    layer, x = L1Norm(WIDTH, eps=0.0).double(), torch.randn(5, WIDTH).double()
    close(layer(x).abs().mean(-1), torch.ones(5).double())


def test_l1_matches_layer_norm_on_normal_rows():
    x = torch.randn(4, 100_000, dtype=torch.float64)
    y = L1Norm(100_000, constant=math.sqrt(math.pi / 2)).double()(x)
    close(y.square().mean(-1), torch.ones(4).double(), rtol=0.02)


def test_l1_gradient_of_a_constant_row():
    layer = L1Norm(WIDTH).double()
    x = torch.full((1, WIDTH), 3.0, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(1, WIDTH).double()
    (gx,) = torch.autograd.grad(layer(x), x, gy)
    close(gx, (gy - gy.mean()) / layer.eps)


def test_seed_starts_as_rms_norm_with_a_gradient_for_beta_alone():
    layer, x = SeeDNorm(WIDTH).double(), torch.randn(5, WIDTH).double()
    close(layer(x), RMSNorm(WIDTH).double()(x))
    layer(x).square().sum().backward()
    assert (layer.alpha.grad == 0).all()
    assert (layer.beta.grad != 0).any()


def test_gated_starts_as_half_an_rms_norm_whose_gate_learns():
    layer, x = GatedNorm(WIDTH).double(), torch.randn(5, WIDTH).double()
    close(layer(x), RMSNorm(WIDTH).double()(x) / 2)
    layer(x).square().sum().backward()
    assert (layer.up.grad != 0).all()


def test_crms_is_rms_of_the_row_with_its_dropped_channel():
    full = torch.randn(5, WIDTH + 1).double()
    full -= full.mean(-1, keepdim=True)
    close(CRMSNorm(WIDTH).double()(full[:, :-1]), SimpleRMSNorm(WIDTH + 1, eps=1e-5).double()(full)[:, :-1])


def test_layer_norm_as_torch():
    for bias in (True, False):
        ours, torchs = LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH, bias=bias)
        x = torch.randn(3, WIDTH)
        assert torch.equal(ours(x), torchs(x))
    assert ours.bias is None


def test_zero_rows_and_infinities():
    x = torch.zeros(2, WIDTH, dtype=torch.float64, requires_grad=True)
    y = RMSNorm(WIDTH).double()(x)
    assert (y == 0).all()
    close(torch.autograd.grad(y, x, torch.ones_like(y))[0], torch.full_like(x, 1e3))  # 1/sqrt(eps)
    assert RMSNorm(WIDTH)(torch.full((1, WIDTH), math.inf)).isnan().all()
