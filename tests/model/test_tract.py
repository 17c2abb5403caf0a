"""TrAct: only the weight's gradient is another one, and it is the one that its equation says."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from trainkit.model.gpt import GPT
from trainkit.model.llama import Llama
from trainkit.model.mlp import ResidualMLP
from trainkit.model.parts.tract import TrActConv2d, TrActEmbedding, TrActLinear, first_layer, whitened
from trainkit.model.vit import ViT
from trainkit.norm.pre import Pre
from trainkit.norm_layer.layer import LayerNorm

F64 = {"dtype": torch.float64}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def twins(plain, made):
    """The plain layer and its TrAct form with equal weights."""
    made.load_state_dict(plain.state_dict())
    return plain, made


def run(layer, x, out=None):
    """(output, upstream gradient, the gradients of the input, weight, bias) for a random upstream gradient."""
    x = x.clone().requires_grad_(x.is_floating_point())
    z = layer(x)
    out = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), **F64).to(z) if out is None else out
    layer.zero_grad()
    z.backward(out)
    bias = getattr(layer, "bias", None)
    return z.detach(), out, x.grad, layer.weight.grad.clone(), None if bias is None else bias.grad.clone()


def formula(rows, out, lam):
    """Gᵀ X (Xᵀ X / b + lam I)^-1, with an explicit inverse."""
    gram = rows.T @ rows / len(rows) + lam * torch.eye(rows.shape[1], **F64)
    return out.T @ rows @ torch.linalg.inv(gram)


@pytest.mark.parametrize("rows", [(40,), (2, 20), (3,), (1, 2)], ids=str)  # more rows than inputs, and fewer
@pytest.mark.parametrize("lam", [0.1, 3.0])
def test_linear(rows, lam):
    plain, tract = twins(nn.Linear(7, 5, **F64), TrActLinear(7, 5, lam=lam, **F64))
    x = torch.randn(*rows, 7, **F64)
    z, out, gx, _, gb = run(plain, x)
    z2, _, gx2, gw, gb2 = run(tract, x)
    assert torch.equal(z, z2)
    assert torch.equal(gx, gx2)
    assert torch.equal(gb, gb2)
    torch.testing.assert_close(gw, formula(x.reshape(-1, 7), out.reshape(-1, 5), lam))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 3},
        {"stride": (2, 1), "padding": (1, 2)},
        {"padding": "same"},
        {"padding": 1, "padding_mode": "reflect"},
        {"dilation": 2, "padding": 1},
        {"groups": 2, "bias": False},
    ],
    ids=str,
)
def test_conv(options):
    plain, tract = twins(nn.Conv2d(4, 6, 3, **options, **F64), TrActConv2d(4, 6, 3, lam=0.2, **options, **F64))
    x = torch.randn(5, 4, 9, 8, **F64)
    z, out, gx, _, gb = run(plain, x)
    z2, _, gx2, gw, gb2 = run(tract, x)
    assert torch.equal(z, z2)
    assert torch.equal(gx, gx2)
    assert (gb is None and gb2 is None) or torch.equal(gb, gb2)
    # The patch of every output by autograd: z is linear in the weight, so d z[i, o, y, x] / d weight[o] is its patch.
    groups = options.get("groups", 1)
    for group in range(groups):
        channel = group * 6 // groups
        patches = torch.autograd.functional.jacobian(
            lambda w: plain._conv_forward(x, w, None)[:, channel].flatten(),  # noqa: B023
            plain.weight.detach(),
        )[:, channel].flatten(1)
        mine = slice(channel, channel + 6 // groups)
        upstream = out[:, mine].movedim(1, -1).flatten(0, -2)
        torch.testing.assert_close(gw[mine].flatten(1), formula(patches, upstream, 0.2))


def test_a_patch_embedding_is_a_convolution_and_a_linear_layer():
    conv = TrActConv2d(3, 6, 4, stride=4, **F64)
    line = TrActLinear(48, 6, **F64)
    with torch.no_grad():
        line.weight.copy_(conv.weight.flatten(1))
        line.bias.copy_(conv.bias)
    x = torch.randn(2, 3, 8, 12, **F64)
    _, out, _, gw, _ = run(conv, x)
    _, _, _, gl, _ = run(line, F.unfold(x, 4, stride=4).mT, out.flatten(2).mT)
    torch.testing.assert_close(gw.flatten(1), gl)


@pytest.mark.parametrize("padding", [None, 2])
def test_an_embedding_is_a_linear_layer_on_one_hot_rows(padding):
    plain = nn.Embedding(9, 5, padding_idx=padding, **F64)
    plain, tract = twins(plain, TrActEmbedding(9, 5, padding_idx=padding, lam=0.1, **F64))
    tokens = torch.randint(7, (4, 6))  # two words never occur
    z, out, _, _, _ = run(plain, tokens)
    z2, _, _, gw, _ = run(tract, tokens)
    assert torch.equal(z, z2)
    line = TrActLinear(9, 5, bias=False, lam=0.1, **F64)
    _, _, _, expected, _ = run(line, F.one_hot(tokens, 9).double(), out)
    if padding is not None:
        expected[:, padding] = 0
    torch.testing.assert_close(gw, expected.T)
    assert not gw[7:].any()


def test_white_inputs_only_scale_the_gradient():
    x = torch.linalg.qr(torch.randn(30, 6, **F64))[0] * 30**0.5  # Xᵀ X / b = I
    plain, tract = twins(nn.Linear(6, 4, **F64), TrActLinear(6, 4, lam=0.3, **F64))
    torch.testing.assert_close(run(tract, x)[3], run(plain, x)[3] / 1.3)


def test_a_large_lambda_is_the_plain_gradient():
    x = torch.randn(30, 6, **F64)
    plain, tract = twins(nn.Linear(6, 4, **F64), TrActLinear(6, 4, lam=1e9, **F64))
    torch.testing.assert_close(run(tract, x)[3] * 1e9, run(plain, x)[3], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [(20, 6), (6, 6), (5, 6), (2, 9, 4), (2, 4, 9)], ids=str)
def test_both_forms_agree(shape):
    x = torch.randn(*shape, **F64)
    rows, columns = shape[-2:]
    primal = x @ torch.linalg.inv(x.mT @ x / rows + 0.1 * torch.eye(columns, **F64))
    dual = torch.linalg.inv(x @ x.mT / rows + 0.1 * torch.eye(rows, **F64)) @ x
    torch.testing.assert_close(primal, dual)
    torch.testing.assert_close(whitened(x, 0.1), primal)


def test_the_change_of_the_pre_activations_does_not_depend_on_the_scale_of_the_input():
    x, out = torch.randn(30, 6, **F64), torch.randn(30, 4, **F64)
    changes = []
    for scale in (1e3, 1e6):
        tract = TrActLinear(6, 4, **F64)
        gw = run(tract, scale * x, out)[3]
        changes.append(scale * x @ gw.T)
    torch.testing.assert_close(*changes, rtol=1e-5, atol=1e-5)
    plain = [scale * x @ run(nn.Linear(6, 4, **F64), scale * x, out)[3].T for scale in (1e3, 1e6)]
    assert plain[1].norm() > 1e5 * plain[0].norm()


def test_raw_pixels_in_float32_stay_exact():
    """Mean 128, lambda 0.1: the condition number is beyond a float32 factorization."""
    x = (torch.rand(400, 48) * 255).round()
    tract = TrActLinear(48, 3)
    _, out, _, gw, _ = run(tract, x)
    expected = formula(x.double(), out.double(), 0.1)
    assert (gw - expected).norm() < 1e-3 * expected.norm()


def test_no_input_no_gradient():
    for layer in (TrActLinear(4, 3), TrActConv2d(1, 3, 2)):
        x = torch.zeros(5, 4) if isinstance(layer, TrActLinear) else torch.zeros(2, 1, 3, 3)
        assert torch.equal(run(layer, x)[3], torch.zeros_like(layer.weight))


LAYERS = {
    "linear": (lambda: TrActLinear(12, 8), lambda: torch.randn(20, 12)),
    "conv": (lambda: TrActConv2d(3, 8, 3, padding=1), lambda: torch.randn(4, 3, 6, 6)),
    "embedding": (lambda: TrActEmbedding(10, 8), lambda: torch.randint(10, (4, 5))),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request):
    make, draw = LAYERS[request.param]
    return make(), draw()


def weight_gradient(layer, x, f):
    layer.zero_grad()
    f(x).float().square().mean().backward()
    return layer.weight.grad.clone()


def test_checkpointing_and_the_next_layer_writing_in_place(layer_and_input):
    layer, x = layer_and_input
    expected = weight_gradient(layer, x, lambda x: torch.relu(layer(x)))
    again = weight_gradient(layer, x, lambda x: checkpoint(lambda x: layer(x).relu_(), x, use_reentrant=False))
    assert torch.equal(again, expected)


def test_autocast_rounds_the_products_and_not_the_solve(layer_and_input):
    layer, x = layer_and_input
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x)
        assert z.dtype == (torch.float32 if isinstance(layer, nn.Embedding) else torch.bfloat16)
    exact = weight_gradient(layer, x, layer)
    coarse = weight_gradient(layer, x, torch.autocast("cpu", torch.bfloat16)(layer.forward))
    assert coarse.dtype == torch.float32
    assert (coarse - exact).norm() < 2e-2 * exact.norm()


def test_half_precision_weights_get_half_precision_gradients():
    tract = TrActLinear(12, 8, dtype=torch.bfloat16)
    x = torch.randn(20, 12, dtype=torch.bfloat16)
    _, out, _, gw, _ = run(tract, x)
    assert gw.dtype == torch.bfloat16
    expected = formula(x.double(), out.double(), 0.1)
    assert (gw - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.slow
def test_compiled(layer_and_input):
    layer, x = layer_and_input
    expected = weight_gradient(layer, x, layer)
    compiled = weight_gradient(layer, x, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, expected)


def test_without_gradients_it_is_the_plain_layer(layer_and_input):
    layer, x = layer_and_input
    with torch.no_grad():
        assert layer(x).grad_fn is None
    with torch.inference_mode():
        layer(x)
    layer.weight.requires_grad_(False)
    assert layer(x).requires_grad == (getattr(layer, "bias", None) is not None)


MODELS = {
    "gpt": (partial(GPT, 32, tie=False), lambda: torch.randint(32, (3, 8))),
    "llama": (partial(Llama, 32, heads=2, hidden=24), lambda: torch.randint(32, (3, 8))),
    "vit": (partial(ViT, [1, 8, 8], 5, heads=2), lambda: torch.randn(3, 1, 8, 8)),
    "mlp": (partial(ResidualMLP, [1, 4, 4], 5), lambda: torch.randn(3, 1, 4, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_in_a_model_only_the_first_weight_gets_another_gradient(name):
    make, draw = MODELS[name]
    x, gradients, states = draw(), [], []
    for settings in ({}, {"first_layer": "tract", "tract_lambda": 0.5}):
        torch.manual_seed(0)
        model = make(norm=Pre(LayerNorm), depth=2, width=16, **settings).double()
        states.append({n: p.clone() for n, p in model.state_dict().items()})
        F.cross_entropy(model(x.double() if x.is_floating_point() else x).flatten(0, -2), target(x)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    plain, tract = gradients
    assert all(torch.equal(states[0][n], p) for n, p in states[1].items())  # the same draws from the same seed
    # Not to the bit: where nothing in front of it needs a gradient, torch may order a plain linear's sums differently.
    changed = [n for n in plain if not torch.allclose(plain[n], tract[n], rtol=1e-9, atol=1e-12)]
    assert changed == ["embed.weight"]


def target(x):
    return torch.zeros(x.numel() if x.dtype == torch.int64 else len(x), dtype=torch.int64)


def test_bad_input():
    with pytest.raises(ValueError, match=r"model\.first_layer is plain or tract; got 'fast'"):
        first_layer(nn.Linear, "fast", 0.1)
    for lam in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"model\.tract_lambda must be above 0"):
            first_layer(nn.Embedding, "tract", lam)
    with pytest.raises(ValueError, match="leave out sparse"):
        TrActEmbedding(4, 2, sparse=True)
