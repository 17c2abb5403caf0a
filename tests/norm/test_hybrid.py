"""HybridNorm against its equations, written with tensors only."""

import pytest
import torch

from .stack import HEADS, WIDTH, Blocks, menu, rms, scatter, softmax_attention, split_heads

DIM = WIDTH // HEADS


pytestmark = pytest.mark.usefixtures("float64")


def rotation(x):
    """Any linear map that differs from the identity and from token to token."""
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def hybrid(weights, x, *, star, kv_heads, depth=2):
    h = x
    for l in range(depth):

        def w(name, block=f"blocks.{l}."):
            return weights[block + name]

        first = star and l == 0
        a = rms(h, w("attn.pre.gain")) if first else h
        q, k, v = split_heads(a @ w("attn.f.qkv.weight").T, [HEADS, kv_heads, kv_heads])
        q, k, v = (rms(t, w(f"attn.f.{n}_norm.gain")) for n, t in (("q", q), ("k", k), ("v", v)))
        k, v = (t.repeat_interleave(HEADS // kv_heads, 1) for t in (rotation(k), v))
        mixed = softmax_attention(rotation(q), k, v, DIM**-0.5).transpose(1, 2).flatten(2)
        y = h + mixed @ w("attn.f.out.weight").T
        u = rms(y, w("mlp.pre.gain" if first else "mlp.norm.gain"))
        z = u @ w("mlp.f.inp.weight").T
        gelu = z * (1 + torch.erf(z / 2**0.5)) / 2
        h = (y if first else u) + gelu @ w("mlp.f.out.weight").T
    return rms(h, weights["after.gain"])


@pytest.mark.parametrize("star", [False, True])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_equations(star, kv_heads):
    model = scatter(Blocks(menu("hybrid", star=star), kv_heads=kv_heads, rotation=rotation))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    x, gy = torch.randn(2, 5, WIDTH), torch.randn(2, 5, WIDTH)
    y, expected = model(x), hybrid(weights, x, star=star, kv_heads=kv_heads)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad(y, list(model.parameters()), gy)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, list(weights.values()), gy), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
