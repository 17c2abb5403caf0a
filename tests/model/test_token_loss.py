"""The loss over a large vocabulary, piece by piece, against the formula on all logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.menu import build
from trainkit.bench.timing import peak_bytes
from trainkit.model.parts import token_loss as parts
from trainkit.model.parts.token_loss import loss_by_pieces, token_loss

SMALL = ["model.depth=2", "model.width=16", "model.heads=2", "model.context=8", "model.vocab=64"]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setitem(parts.PIECE, "cpu", 100)


def inputs(dtype, *, tokens=(3, 7), width=5, vocab=11):
    torch.manual_seed(0)
    h = torch.randn(*tokens, width, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(vocab, width, dtype=torch.float64).to(dtype).requires_grad_()
    return h, w, torch.randint(vocab, tokens)


@pytest.mark.parametrize("vocab", [11, 100, 1000])
def test_loss_and_gradients_are_those_of_the_formula(small_pieces, vocab):
    h, w, y = inputs(torch.float64, vocab=vocab)
    (3 * loss_by_pieces(h, w, y)).backward()
    found = h.grad, w.grad
    p = h.detach() @ w.detach().T
    logp = p - p.exp().sum(-1, keepdim=True).log()
    onehot = F.one_hot(y, vocab).double()
    slope = 3 * (logp.exp() - onehot) / y.numel()
    torch.testing.assert_close(loss_by_pieces(h, w, y), -(logp * onehot).sum() / y.numel(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0], slope @ w.detach(), rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(found[1], slope.flatten(0, 1).T @ h.detach().flatten(0, 1), rtol=1e-11, atol=1e-14)


def test_autocast_rounds_products_and_nothing_else(small_pieces):
    h, w, y = inputs(torch.float32, tokens=(4, 64), width=32, vocab=50)
    exact = token_loss(h.double() @ w.double().T, y)
    exact.backward()
    wanted, h.grad, w.grad = (h.grad.clone(), w.grad.clone()), None, None
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_by_pieces(h, w, y)
    loss.backward()
    assert loss.dtype == h.grad.dtype == w.grad.dtype == torch.float32
    assert abs(loss - exact) < 2e-3 * exact
    for found, want in zip((h.grad, w.grad), wanted, strict=True):
        assert (found - want).norm() < 1e-2 * want.norm()


def test_half_precision_weights_keep_their_dtype_and_a_float32_loss(small_pieces):
    h, w, y = inputs(torch.bfloat16, tokens=(4, 16))
    loss = loss_by_pieces(h, w, y)
    loss.backward()
    assert (loss.dtype, h.grad.dtype, w.grad.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)


def test_what_needs_no_gradient_gets_none(small_pieces):
    h, w, y = inputs(torch.float64)
    with torch.no_grad():
        assert not loss_by_pieces(h, w, y).requires_grad
    loss_by_pieces(h.detach(), w, y).backward()
    assert h.grad is None
    assert w.grad is not None


def test_logits_are_never_all_there():
    rows, width, vocab = 4096, 16, 20_000
    h, w = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    y = torch.randint(vocab, (rows,))
    assert peak_bytes(lambda: loss_by_pieces(h, w, y).backward()) < 0.5 * 4 * rows * vocab


@pytest.mark.parametrize("norm", ["pre", "ngpt"])
@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_a_decoder_gives_the_loss_of_its_logits(small_pieces, name, norm):
    network = build("model", f"model={name}", f"norm={norm}", *SMALL).double()
    x = torch.randint(8, (2, 8))
    found = network(x, x)
    torch.testing.assert_close(found, token_loss(network(x), x), rtol=1e-12, atol=0)
    found.backward()
    assert all(p.grad is not None for p in network.parameters())


def test_whoever_listens_to_the_head_hears_it(small_pieces):
    network, heard = build("model", "model=gpt", *SMALL), []
    x = torch.randint(8, (2, 8))
    network(x, x)
    network.head.register_forward_hook(lambda *_: heard.append(1))
    network(x, x)
    assert heard == [1]


def test_torch_has_the_same_numbers(small_pieces):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy to compare with")
    h, w, y = inputs(torch.float32, tokens=(2, 50), vocab=70)
    theirs = F.linear_cross_entropy(h.flatten(0, 1), w, y.flatten(), options=nn.LinearCrossEntropyOptions())
    torch.testing.assert_close(loss_by_pieces(h, w, y), theirs, rtol=1e-6, atol=0)


def test_float16_is_not_made_by_pieces(small_pieces):
    """Its gradients, made before the loss is scaled, would be rounded to 0."""
    h, _, _ = inputs(torch.float32)
    assert parts.large(21, 11, h)
    assert not parts.large(21, 11, h.half())
    with torch.autocast("cpu", torch.float16):
        assert not parts.large(21, 11, h)
    with torch.autocast("cpu", torch.bfloat16):
        assert parts.large(21, 11, h)
