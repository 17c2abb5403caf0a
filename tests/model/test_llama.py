"""llama against a plain functional implementation: rotary by complex numbers, SwiGLU, grouped queries."""

from math import sqrt

import pytest
import torch
from torch import Tensor

from tests.menu import build

WIDTH, HEADS, KV, HIDDEN, DEPTH, CONTEXT, VOCAB = 16, 4, 2, 20, 2, 9, 64
SIZE = WIDTH // HEADS


def model(*more: str):
    sizes = [f"model.{k}={v}" for k, v in {"width": WIDTH, "heads": HEADS, "kv_heads": KV, "hidden": HIDDEN}.items()]
    torch.manual_seed(2)
    net = build("model", "model=llama", *sizes, f"model.depth={DEPTH}", f"model.context={CONTEXT}", *more).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return net


def rotate(x: Tensor) -> Tensor:
    """(B, T, size): the pair (i, i + size/2) as a complex number, times exp(i t / 10000^(2i/size))."""
    z = torch.complex(x[..., : SIZE // 2], x[..., SIZE // 2 :])
    frequency = 10000.0 ** (-torch.arange(SIZE // 2, dtype=torch.float64) * 2 / SIZE)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def plain(w: dict[str, Tensor], tokens: Tensor) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.gain"]

    h = w["embed.weight"][tokens]
    mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    for l in range(DEPTH):
        at = f"blocks.{l}.attn"
        x = norm(h, f"{at}.pre") @ w[f"{at}.f.qkv.weight"].T
        q, k, v = x.split([WIDTH, KV * SIZE, KV * SIZE], -1)
        heads = []
        for n in range(HEADS):
            mine, shared = slice(n * SIZE, (n + 1) * SIZE), n // (HEADS // KV)
            theirs = slice(shared * SIZE, (shared + 1) * SIZE)
            scores = rotate(q[..., mine]) @ rotate(k[..., theirs]).transpose(1, 2) / sqrt(SIZE)
            heads.append(scores.masked_fill(mask, float("-inf")).softmax(-1) @ v[..., theirs])
        h = h + torch.cat(heads, -1) @ w[f"{at}.f.out.weight"].T
        at = f"blocks.{l}.mlp"
        gate, up = (norm(h, f"{at}.pre") @ w[f"{at}.f.inp.weight"].T).split(HIDDEN, -1)
        h = h + (gate * torch.sigmoid(gate) * up) @ w[f"{at}.f.out.weight"].T
    return norm(h, "after") @ w["head.weight"].T


def test_logits_and_gradients_equal_a_plain_implementation():
    net = model()
    tokens = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    expected, actual = plain(weights, tokens), net(tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-9, atol=1e-9, msg=name)


def test_its_own_norm_layer_comes_with_it_and_the_command_line_wins():
    assert type(model().after).__name__ == "RMSNorm"
    assert type(model("norm_layer=layer").after).__name__ == "LayerNorm"


@pytest.mark.parametrize("mode", ["head", "full"])
def test_qk_norm_makes_attention_blind_to_the_scale_of_queries(mode):
    net = model(f"model.qk_norm={mode}")
    tokens = torch.randint(VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    before = net(tokens)
    with torch.no_grad():
        net.blocks[0].attn.f.qkv.weight[:WIDTH] *= 7
    torch.testing.assert_close(net(tokens), before, rtol=1e-4, atol=1e-4)


def test_a_placement_that_normalizes_queries_refuses_a_second_norm():
    with pytest.raises(Exception, match=r"model\.qk_norm=head must be none"):
        model("norm=hybrid", "model.qk_norm=head")


@pytest.mark.parametrize(
    ("name", "millions"), [("9m", 9), ("20m", 20), ("35m", 35), ("60m", 58), ("71m", 71), ("130m", 134)]
)
def test_sizes_are_what_they_are_called(name, millions):
    """Nominal at a vocabulary of 32,000, as in the papers; counted on the meta device."""
    with torch.device("meta"):
        net = build("model", f"model=llama_{name}", "model.vocab=32000")
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.04)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [(["model.kv_heads=3"], "model.heads must be a multiple of model.kv_heads"), (["model.heads=16"], "an even width")],
)
def test_mistakes_are_named(words, sentence):
    with pytest.raises(Exception, match=sentence):
        model(*words)
