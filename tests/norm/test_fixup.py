"""Fixup against its equations and its rules of initialization."""

import pytest
import torch

from trainkit.norm.placement import Site

from .stack import HEADS, WIDTH, Blocks, menu, scatter, softmax_attention, split_heads

DIM = WIDTH // HEADS


pytestmark = pytest.mark.usefixtures("float64")


def fixup(weights, x, *, depth=2):
    """The biases before an MLP's last layer are those of the site "last", zero where a model has none."""
    h = x
    for l in range(depth):

        def w(name, block=f"blocks.{l}."):
            return weights.get(block + name, torch.zeros(1))

        q, k, v = split_heads((h + w("attn.pre.bias")) @ w("attn.f.qkv.weight").T, [HEADS] * 3)
        mixed = softmax_attention(q, k, v, DIM**-0.5).transpose(1, 2).flatten(2)
        h = h + w("attn.scale") * (mixed @ w("attn.f.out.weight").T)
        z = (h + w("mlp.pre.bias")) @ w("mlp.f.inp.weight").T + w("mlp.f.hidden_norm.bias")
        gelu = z * (1 + torch.erf(z / 2**0.5)) / 2
        h = h + w("mlp.scale") * ((gelu + w("mlp.f.last_norm.bias")) @ w("mlp.f.out.weight").T)
    return h + weights["after.bias"]


def test_equations():
    model = scatter(Blocks(menu("fixup")))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x, gy = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    y, expected = model(x), fixup(weights, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(y, list(model.parameters()), gy)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(weights.values()), gy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("layers", "power"), [(2, -1 / 2), (3, -1 / 4)])
def test_initialization(layers, power):
    torch.manual_seed(3)
    usual = Blocks(menu("pre"), depth=2).state_dict()
    torch.manual_seed(3)
    model = Blocks(menu("fixup", layers=layers), depth=2)
    factor = 4**power  # four sublayers
    for name, p in model.named_parameters():
        if name.endswith("qkv.weight"):
            expected = usual[name].clone()
            expected[2 * WIDTH :] *= factor
        elif name.endswith("inp.weight"):
            expected = usual[name] * factor
        else:
            expected = torch.ones_like(p) if name.endswith("scale") else torch.zeros_like(p)
        torch.testing.assert_close(p.detach(), expected)


def test_starts_as_the_identity_and_learns_at_the_first_step():
    model, x = Blocks(menu("fixup")), torch.randn(2, 5, WIDTH)
    y = model(x)
    assert torch.equal(y, x)
    y.pow(2).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad.abs().max() > 0}
    assert {f"blocks.{l}.{s}.f.out.weight" for l in range(2) for s in ("attn", "mlp")} <= moved


@pytest.mark.parametrize(("kind", "count"), [("hidden", 1), ("last", 1), ("q", 0), ("logits", 0)])
def test_where_biases_stand(kind, count):
    assert len(list(menu("fixup").inside(Site(kind, 4)).parameters())) == count
