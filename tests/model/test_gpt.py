"""gpt against a plain functional transformer, written independently of the model's modules."""

from math import sqrt

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.menu import build

WIDTH, HEADS, DEPTH, CONTEXT, VOCAB = 12, 3, 8, 10, 64


def model(placement: str, *more: str):
    sizes = [f"model.width={WIDTH}", f"model.heads={HEADS}", f"model.depth={DEPTH}", f"model.context={CONTEXT}"]
    torch.manual_seed(1)
    net = build("model", "model=gpt", f"norm={placement}", "norm_layer=layer", *sizes, *more).double()
    with torch.no_grad():  # gains and biases away from their start, so that a misplaced norm shows
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net


def plain(w: dict[str, Tensor], tokens: Tensor, placement: str) -> Tensor:
    """nanoGPT's mathematics with explicit matrices: attention by softmax and mask, LayerNorm by its formula."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.gain"] + w[f"{name}.bias"]

    def attention(x: Tensor, at: str) -> Tensor:
        length, size = x.shape[1], WIDTH // HEADS
        q, k, v = (x @ w[f"{at}.qkv.weight"].T).split(WIDTH, dim=-1)
        heads = []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / sqrt(size)
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ v[..., part])
        return torch.cat(heads, -1) @ w[f"{at}.out.weight"].T

    def mlp(x: Tensor, at: str) -> Tensor:
        u = x @ w[f"{at}.inp.weight"].T
        return (u * 0.5 * (1 + torch.erf(u / sqrt(2)))) @ w[f"{at}.out.weight"].T

    h = w["embed.weight"][tokens] + w["position.weight"][: tokens.shape[1]]
    if placement == "peri":
        h = norm(h, "before")
    for l in range(DEPTH):
        for name, f in (("attn", attention), ("mlp", mlp)):
            at = f"blocks.{l}.{name}"
            if placement == "post" or (placement == "mix" and l < 2):  # floor(0.25 · 8) = 2
                h = norm(h + f(h, f"{at}.f"), f"{at}.post")
            elif placement == "peri":
                h = h + norm(f(norm(h, f"{at}.pre"), f"{at}.f"), f"{at}.out")
            elif placement == "lns":
                h = h + f(norm(h, f"{at}.pre.norm") / sqrt(l + 1), f"{at}.f")
            else:
                h = h + f(norm(h, f"{at}.pre"), f"{at}.f")
    if placement != "post":
        h = norm(h, "after")
    return h @ w["embed.weight"].T


@pytest.mark.parametrize("placement", ["pre", "post", "peri", "mix", "lns"])
def test_logits_and_gradients_equal_a_plain_implementation(placement):
    net = model(placement)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCAB, (2, 3, CONTEXT), generator=generator)
    weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}

    expected = plain(weights, tokens, placement)
    F.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    actual = net(tokens)
    F.cross_entropy(actual.flatten(0, 1), targets.flatten()).backward()

    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-10, atol=1e-10, msg=name)


def test_no_token_sees_the_future():
    net = model("pre")
    tokens = torch.randint(VOCAB, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % VOCAB
    same = (net(tokens) == net(changed)).all(-1)[0]
    assert same.tolist() == [True] * 6 + [False] * 4


@pytest.mark.parametrize(("init", "deep"), [("gpt2", 0.02 / sqrt(2 * 8)), ("plain", 0.02)])
def test_output_projections_start_as_init_says(init, deep):
    net = build("model", "model=gpt", "model.depth=8", "model.width=128", f"model.init={init}")
    for block in net.blocks:
        for linear, std in ((block.attn.f.qkv, 0.02), (block.attn.f.out, deep), (block.mlp.f.out, deep)):
            assert linear.weight.std().item() == pytest.approx(std, rel=0.05)


def test_lns_turns_depth_scaled_initialization_off():
    net = build("model", "model=gpt", "norm=lns", "model.depth=8")
    assert net.blocks[0].mlp.f.out.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_dropout_acts_in_training_only():
    net = model("pre", "model.dropout=0.5")
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert not torch.equal(net(tokens), net(tokens))
    net.eval()
    assert torch.equal(net(tokens), net(tokens))


def test_flops_count_every_matrix_product():
    net = build("model", "model=gpt", "model.depth=2", "model.width=16", "model.heads=2")
    weights = 2 * (16 * 48 + 16 * 16 + 2 * 16 * 64) + 16 * 64
    assert net.flops_per_token(32) == 6 * weights + 12 * 2 * 16 * 32


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model.width=100", "model.heads=3"], "model.width must be a multiple of model.heads"),
        (["model.init=other"], "model.init is gpt2 or plain"),
        (["model.depth=0"], "model.depth must be at least 1"),
        (["model.hidden=0"], "model.hidden must be at least 1"),
        (["model.gelu=relu"], "model.gelu is exact or tanh"),
        (["norm=mix", "norm.alpha=1.5"], "norm.alpha is the share of Post-LN blocks"),
    ],
)
def test_mistakes_are_named(words, sentence):
    with pytest.raises(Exception, match=sentence):
        build("model", "model=gpt", *words)


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="at most 10 tokens at once; got 11"):
        model("pre")(torch.zeros(1, 11, dtype=torch.long))
