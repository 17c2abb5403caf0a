"""What the next token is drawn from, and what a reader reads when the text outgrows its context."""

from itertools import islice

import pytest
import torch
from torch import nn

from tests.menu import build
from trainkit.model.parts.generate import Reader, draw, tokens_after

LOGITS = torch.tensor([[2.0, 0.5, 1.0, -1.0, 1.5]])
ORDER = [0, 4, 2, 1, 3]  # likeliest first


def drawn(count=20000, logits=LOGITS, **options):
    """How often each token is drawn."""
    options = {"temperature": 1.0, "top_k": None, "top_p": 1.0} | options
    tokens = draw(logits.expand(count, -1), torch.Generator().manual_seed(0), **options)
    return torch.bincount(tokens, minlength=logits.shape[1]) / count


def near(frequencies, probabilities):
    """Within five standard deviations of a frequency over 20000 draws."""
    deviation = (probabilities * (1 - probabilities) / 20000).sqrt()
    return bool(((frequencies - probabilities).abs() <= 5 * deviation).all())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    assert near(drawn(temperature=temperature), (LOGITS[0] / temperature).softmax(-1))


def test_temperature_zero_takes_the_likeliest():
    assert draw(LOGITS, torch.Generator(), temperature=0, top_k=None, top_p=1.0).tolist() == [0]
    assert drawn(100, temperature=1e-300)[0] == 1


@pytest.mark.parametrize("k", [1, 2, 4, 5, 100])
def test_top_k_leaves_the_likeliest(k):
    p = LOGITS[0].softmax(-1)
    kept = torch.zeros(5)
    kept[ORDER[:k]] = p[ORDER[:k]]
    assert near(drawn(top_k=k), kept / kept.sum())


@pytest.mark.parametrize(("share", "kept"), [(1e-9, 1), (0.4, 1), (0.5, 2), (0.75, 3), (0.9, 4), (1.0, 5)])
def test_top_p_leaves_the_fewest_that_have_the_share(share, kept):
    p = LOGITS[0].softmax(-1)
    cumulative = p[ORDER].cumsum(0)
    assert cumulative[kept - 1] >= share - 1e-6  # the table above is right
    assert kept == 1 or cumulative[kept - 2] < share
    expected = torch.zeros(5)
    expected[ORDER[:kept]] = p[ORDER[:kept]]
    assert near(drawn(top_p=share), expected / expected.sum())


def test_top_p_is_a_share_of_what_top_k_leaves():
    # e^2, e^1.5, e^1: 0.51, 0.31, 0.19 of their sum, so 0.8 needs two; of all five it would need three.
    assert drawn(top_k=3, top_p=0.8).gt(0).nonzero().flatten().tolist() == [0, 4]


def test_equal_logits_leave_k_tokens():
    assert drawn(1000, logits=torch.zeros(1, 6), top_k=2).gt(0).sum() == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_diverged_model_is_named(bad, temperature):
    with pytest.raises(ValueError, match="not finite"):
        draw(torch.tensor([[0.0, bad]]), torch.Generator(), temperature=temperature, top_k=None, top_p=1.0)


class Last(nn.Module):
    """Logits that say how many tokens were read at once, and which was the first; keeps what it has seen."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, tokens):
        self.seen.append(tokens[0].tolist())
        return torch.zeros(*tokens.shape, 10)


def test_a_text_that_outgrows_the_context_is_read_again_from_its_last_half():
    net = Last()
    reader = Reader(net, 4, cached=False)
    for token in range(8):
        reader.read(torch.tensor([[token]]))
    assert net.seen == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [3, 4], [3, 4, 5], [3, 4, 5, 6], [6, 7]]
    reader = Reader(net, 4, cached=False)
    reader.read(torch.arange(9)[None])  # a long prompt
    assert reader.reads.tolist() == [[7, 8]]
    reader = Reader(net, 1, cached=False)
    for token in range(3):
        reader.read(torch.tensor([[token]]))
        assert reader.reads.tolist() == [[token]]


@pytest.mark.parametrize("kind", ["gpt", "llama"])
@pytest.mark.parametrize("context", [1, 7, 32])
def test_the_cache_changes_no_logit_while_the_context_slides(kind, context):
    words = [f"model.context={context}", "model.width=16", "model.heads=2", "model.depth=2"]
    net = build("model", f"model={kind}", *words).double().eval()
    readers = [Reader(net, context, cached=cached) for cached in (True, False)]
    parts = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0)).split([3, *[1] * 20, 2, *[1] * 5], 1)
    for part in parts:
        kept, again = (reader.read(part) for reader in readers)
        torch.testing.assert_close(kept, again, rtol=1e-10, atol=1e-10)


def test_equal_seeds_draw_equal_texts():
    net = build("model", "model=gpt", "model.width=16", "model.depth=1", "model.context=8").eval()

    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        options = {"temperature": 1.0, "top_k": None, "top_p": 1.0}
        return list(
            islice(tokens_after(Reader(net, 8, cached=True), torch.zeros(1, 1).long(), generator, **options), 30)
        )

    assert text(0) == text(0) != text(1)
