"""Attention weights recomputed from what the fused product took, and what they tell."""

import math

import pytest
import torch
from torch import nn

from trainkit.measure.attention import (
    Attending,
    attention_entropy,
    attention_logits,
    attention_sink,
    largest_logit,
)
from trainkit.model.parts import attention as parts
from trainkit.model.parts.attention import Attention
from trainkit.model.parts.rotary import Rotary
from trainkit.norm.hybrid import Hybrid
from trainkit.norm.ngpt import NGPT
from trainkit.norm.placement import Site
from trainkit.norm.pre import Pre
from trainkit.norm_layer.rms import RMSNorm

LENGTH, HEADS, WIDTH = 5, 4, 32


def seen_by(layer, x):
    found = []
    with Attending(nn.ModuleDict({"attn": layer}), lambda *args: found.append(args)):
        layer(x)
    ((name, q, k, causal),) = found
    assert name == "attn"
    return q, k, causal


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("placement", [Pre, NGPT, Hybrid])
def test_the_weights_are_those_that_the_layer_uses(monkeypatch, causal, kv_heads, placement):
    torch.manual_seed(0)
    layer = Attention(
        Site("attn", WIDTH, layer=1, depth=3, index=2, count=6),
        placement(RMSNorm),
        heads=HEADS,
        kv_heads=kv_heads,
        causal=causal,
        rotation=Rotary(WIDTH // HEADS, LENGTH),
        std=0.5,
    ).double()
    product, taken = parts.F.scaled_dot_product_attention, []

    def noted(q, k, v, **options):
        taken.append((v, product(q, k, v, **options)))
        return taken[-1][1]

    monkeypatch.setattr(parts.F, "scaled_dot_product_attention", noted)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    q, k, is_causal = seen_by(layer, x)
    assert is_causal is causal
    weights = attention_logits(q, k, causal=is_causal).softmax(-1)
    v, y = taken[0]
    assert torch.allclose(weights @ v.repeat_interleave(HEADS // kv_heads, 1), y, rtol=1e-10, atol=1e-12)


def test_no_hook_stays_behind():
    layer = Attention(Site("attn", WIDTH), Pre(RMSNorm), heads=HEADS)
    seen_by(layer, torch.randn(1, LENGTH, WIDTH))
    assert not any(module._forward_hooks for module in layer.modules())


def test_even_weights_have_the_entropy_of_all_positions():
    even = attention_logits(torch.zeros(2, 3, LENGTH, 8), torch.zeros(2, 3, LENGTH, 8), causal=False).softmax(-1)
    assert attention_entropy(even).tolist() == pytest.approx([math.log(LENGTH)] * 3)
    assert attention_sink(even).tolist() == pytest.approx([1 / LENGTH] * 3)
    causal = attention_logits(torch.zeros(1, 1, LENGTH, 8), torch.zeros(1, 1, LENGTH, 8), causal=True).softmax(-1)
    assert float(attention_entropy(causal)) == pytest.approx(math.log(math.factorial(LENGTH)) / LENGTH)
    assert float(attention_sink(causal)) == pytest.approx(sum(1 / t for t in range(2, LENGTH + 1)) / (LENGTH - 1))


def test_heads_are_told_apart():
    weights = torch.zeros(1, 2, 4, 4)
    weights[0, 0, :, 0] = 1  # all look at the first position
    weights[0, 1] = torch.eye(4)  # each looks at itself
    assert attention_entropy(weights).tolist() == [0, 0]
    assert attention_sink(weights).tolist() == [1, 0]


def test_entropy_is_the_sum_over_positions():
    p = torch.rand(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = [
        sum(-x * math.log(x) for x in p[:, head].flatten().tolist()) / (2 * 4)
        for head in range(3)
    ]  # fmt: skip
    assert attention_entropy(p).tolist() == pytest.approx(expected, rel=1e-12)


def test_the_largest_logit_is_of_a_pair_that_is_seen():
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
    q[..., 0, :], k[..., 1, :] = 100.0, 1.0  # the first query may not look at the second key
    q[..., 1, :] = -3.0
    assert float(largest_logit(attention_logits(q, k, causal=True))) == 3 * 4 / 2
    assert float(largest_logit(attention_logits(q, k, causal=False))) == 100 * 4 / 2
