"""nGPT against its equations, with the shared query-key scale and the softmax scale of the paper written out."""

from math import sqrt

import pytest
import torch

from trainkit.norm.placement import Site
from trainkit.projection.unit import Unit

from .stack import HEADS, WIDTH, Blocks, menu, scatter, softmax_attention, split_heads, toys

DIM, ROOT = WIDTH // HEADS, sqrt(WIDTH)


pytestmark = pytest.mark.usefixtures("float64")


def unit(z):
    return z / z.pow(2).sum(-1, keepdim=True).sqrt()


def step(h, u, stored):
    h, u = unit(h), unit(u)
    return unit(h + (stored * 0.05 * ROOT).abs() * (u - h))


def ngpt(weights, x, *, kv_heads=HEADS, depth=2):
    h = x
    for l in range(depth):

        def w(name, block=f"blocks.{l}."):
            return weights[block + name]

        q, k, v = split_heads(h @ w("attn.f.qkv.weight").T, [HEADS, kv_heads, kv_heads])
        s = (w("attn.f.q_rotated.scale") * ROOT).view(HEADS, 1, DIM)
        k, v = (t.repeat_interleave(HEADS // kv_heads, 1) for t in (k, v))
        mixed = softmax_attention(s * unit(q), s * unit(k), v, sqrt(DIM)).transpose(1, 2).flatten(2)
        h = step(h, mixed @ w("attn.f.out.weight").T, w("attn.step"))
        z = w("mlp.f.hidden_norm.scale") * ROOT * (h @ w("mlp.f.inp.weight").T)
        gelu = z * (1 + torch.erf(z / 2**0.5)) / 2
        h = step(h, gelu @ w("mlp.f.out.weight").T, w("mlp.step"))
    return h


@pytest.mark.parametrize("kv_heads", [3, 1])
def test_equations(kv_heads):
    model = scatter(Blocks(menu("ngpt"), kv_heads=kv_heads))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x, gy = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    y, expected = model(x), ngpt(weights, x, kv_heads=kv_heads)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(y, list(model.parameters()), gy)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(weights.values()), gy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_logits_are_scaled_per_word():
    scale = menu("ngpt").inside(Site("logits", 7, stream=WIDTH))
    torch.testing.assert_close(scale.scale, torch.full((7,), 1 / ROOT))
    logits = torch.randn(2, 7)
    torch.testing.assert_close(scale(logits), logits)
    scatter(scale)
    torch.testing.assert_close(scale(logits), scale.scale * ROOT * logits)


def test_first_values_are_those_of_the_official_code():
    model = Blocks(menu("ngpt", rate=0.1))
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    for stored, first in ((attn.step, 1 / ROOT), (attn.f.q_rotated.scale, 1 / ROOT), (mlp.f.hidden_norm.scale, 1.0)):
        torch.testing.assert_close(stored, torch.full_like(stored, first))
    assert attn.f.q_rotated.scale.shape == (WIDTH,)
    assert not list(attn.f.k_rotated.parameters())


def test_every_row_of_the_stream_has_length_one():
    model, h = scatter(toys(menu("ngpt"))), torch.randn(2, 5, WIDTH)
    for sublayer in model.sublayers:
        h = sublayer(h)
        torch.testing.assert_close(h.norm(dim=-1), torch.ones(2, 5))


def test_neither_length_nor_the_sign_of_a_step_matters():
    model, h = toys(menu("ngpt")), torch.randn(2, 5, WIDTH)
    first, y = model.sublayers[0], model.sublayers[0](h)
    with torch.no_grad():
        first.f.last.weight *= 8
        first.step *= -1
    torch.testing.assert_close(first(h), y)


def test_zero_is_left_zero():
    first = toys(menu("ngpt")).sublayers[0]
    h = torch.zeros(1, 1, WIDTH, requires_grad=True)
    y = first(h)
    y.sum().backward()
    assert torch.equal(y, torch.zeros_like(y))
    assert h.grad.isfinite().all()


def test_projection_makes_the_vectors_of_every_layer_unit():
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(9, WIDTH),
            "blocks": Blocks(menu("ngpt")),
            "head": torch.nn.Linear(WIDTH, 9),
        }
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Unit()(model)
    axes = {"qkv.weight": -1, "inp.weight": -1, "out.weight": 0, "embed.weight": -1, "head.weight": -1}
    seen = set()
    for name, p in model.named_parameters():
        axis = next((a for end, a in axes.items() if name.endswith(end)), None)
        if axis is None:
            assert torch.equal(p, before[name])
            continue
        seen.add(name.split(".", 3)[-1])
        torch.testing.assert_close(p.detach(), before[name] / before[name].norm(dim=axis, keepdim=True))
        torch.testing.assert_close(p.norm(dim=axis), torch.ones(p.numel() // p.shape[axis]))
    assert len(seen) == 5
    once = {name: p.detach().clone() for name, p in model.named_parameters()}
    Unit()(model)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), once[name], rtol=1e-15, atol=1e-16)


def test_projection_leaves_gradients_tied_weights_and_zero_rows_alone():
    embed, head = torch.nn.Embedding(5, 4, padding_idx=0), torch.nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    embed(torch.tensor([1])).sum().backward()
    gradient = embed.weight.grad.clone()
    Unit()(torch.nn.ModuleList([embed, head]))
    assert head.weight is embed.weight
    assert torch.equal(embed.weight.grad, gradient)
    torch.testing.assert_close(embed.weight.norm(dim=-1), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_projection_in_low_precision(dtype):
    layer = torch.nn.Linear(300, 3, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight *= 1000  # in fp16 the sum of the squares overflows
    Unit()(layer)
    torch.testing.assert_close(layer.weight.double().norm(dim=-1), torch.ones(3), rtol=4e-3, atol=4e-3)


def test_projection_that_finds_nothing_says_so():
    with pytest.raises(ValueError, match="projection=unit needs embeddings or linear layers"):
        Unit()(torch.nn.Conv2d(3, 3, 1))
