"""NaP's placement against its equations, and the scale invariance that the projection relies on."""

import pytest
import torch
from torch.nn import functional as F

from tests.menu import build
from trainkit.norm.placement import Site

from .stack import WIDTH, Blocks, menu, rms, scatter, softmax_attention, split_heads

pytestmark = pytest.mark.usefixtures("float64")


def test_equations():
    model = scatter(Blocks(menu("nap"), depth=1))
    w = dict(model.named_parameters())
    h = x = torch.randn(2, 5, WIDTH)
    z = rms(h, w["blocks.0.attn.pre.gain"])
    q, k, v = split_heads(z @ w["blocks.0.attn.f.qkv.weight"].T, [3, 3, 3])
    mixed = softmax_attention(q, k, v, (WIDTH // 3) ** -0.5).transpose(1, 2).flatten(2)
    h = h + mixed @ w["blocks.0.attn.f.out.weight"].T
    z = rms(h, w["blocks.0.mlp.pre.gain"]) @ w["blocks.0.mlp.f.inp.weight"].T
    z = F.gelu(rms(z, w["blocks.0.mlp.f.hidden_norm.gain"]))
    h = h + z @ w["blocks.0.mlp.f.out.weight"].T
    torch.testing.assert_close(model(x), rms(h, w["after.gain"]), rtol=1e-10, atol=1e-10)


def test_what_feeds_an_activation_is_scale_invariant():
    model, x = scatter(Blocks(menu("nap"))), torch.randn(2, 5, WIDTH)
    y = model(x)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.f.inp.weight.mul_(7)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_norms_stand_before_activations_only():
    placement = menu("nap")
    for kind in ("q", "k", "v", "q_rotated", "last", "logits"):
        assert isinstance(placement.inside(Site(kind, WIDTH)), torch.nn.Identity)
    assert placement.inside(Site("hidden", WIDTH)).gain.shape == (WIDTH,)


def test_the_choice_brings_its_projection_an_untied_head_and_no_biases():
    words = ["norm=nap", "model.depth=1", "model.width=8", "model.heads=2"]
    assert type(build("projection", *words)).__name__ == "NaP"
    model = build("model", "model=gpt", *words)
    assert model.head.weight is not model.embed.weight
    assert not [
        name
        for name, _ in model.named_parameters()
        if name.endswith("bias") and "norm" not in name and not name.endswith(("pre.bias", "after.bias"))
    ]
