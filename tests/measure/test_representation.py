"""Diagnostics of hidden states against loops over tokens, in float64."""

import math
from statistics import mean, median, pvariance

import pytest
import torch

from trainkit.measure import representation as r

LAYERS, BATCH, TOKENS, WIDTH = 4, 3, 5, 6


def hidden(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(LAYERS, BATCH, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return steps.cumsum(0) + 0.5


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.hypot(*a) / math.hypot(*b)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("tokens", ["all", "last"])
def test_angles_between_layers(n, tokens):
    h = hidden()
    places = range(TOKENS) if tokens == "all" else [TOKENS - 1]
    for layer, found in enumerate(r.angular_distance(h, n, tokens=tokens).tolist()):
        pairs = [(h[layer, b, t].tolist(), h[layer + n, b, t].tolist()) for b in range(BATCH) for t in places]
        assert found == pytest.approx(mean(math.acos(cosine(a, c)) / math.pi for a, c in pairs), abs=1e-12)
    for layer, found in enumerate(r.block_influence(h, n).tolist()):
        pairs = [(h[layer, b, t].tolist(), h[layer + n, b, t].tolist()) for b in range(BATCH) for t in range(TOKENS)]
        assert found == pytest.approx(mean(1 - cosine(a, c) for a, c in pairs), abs=1e-12)
    assert len(r.angular_distance(h, n)) == LAYERS - n


def test_angles_at_their_ends():
    x = torch.randn(2, 3, 4, dtype=torch.float32)
    h = torch.stack([x, 7 * x, -x, 0 * x])
    assert r.angular_distance(h).tolist() == pytest.approx([0, 1, 0.5], abs=1e-6)
    assert r.block_influence(h).tolist() == pytest.approx([0, 2, 1], abs=1e-6)
    huge = torch.stack([x, x + 1]) * 1e25  # squares overflow
    assert r.angular_distance(huge)[0] == pytest.approx(r.angular_distance(huge / 1e25)[0].item(), rel=1e-4)
    broken = h.clone()
    broken[1, 0, 0, 0] = math.nan
    assert r.angular_distance(broken).isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("tokens", ["all", "last"])
def test_all_pairs_at_once_are_the_pairs_one_by_one(tokens):
    h = hidden(2)
    h[3, 0, 0] = 0  # without a direction
    found = r.angular_distances(h, tokens=tokens)
    for n in range(1, LAYERS):
        assert found.diagonal(n).tolist() == pytest.approx(r.angular_distance(h, n, tokens=tokens).tolist(), abs=1e-8)
    assert torch.equal(found, found.mT)
    assert not found.diagonal().any()


def test_all_pairs_in_single_precision_tell_small_turns():
    h = torch.ones(2, 1, 1, 4)
    h[1, ..., 0] += 1e-3  # an angle of about 4.3e-4, of which float32's arccos knows one digit
    assert float(r.angular_distances(h)[0, 1]) == pytest.approx(float(r.angular_distance(h.double())[0]), rel=1e-3)
    with pytest.raises(ValueError, match="all or last"):
        r.angular_distances(h, tokens="first")
    with pytest.raises(ValueError, match=r"\(L, B, T, C\)"):
        r.angular_distances(h[0])


def test_the_share_of_sinks():
    assert float(r.sink_share(torch.ones(200))) == pytest.approx(0.01)
    means = torch.ones(200)
    means[7], means[8] = 150.0, 50.0
    assert float(r.sink_share(means)) == pytest.approx(200 / 398)
    assert float(r.sink_share(torch.tensor([1.0, 3.0]))) == pytest.approx(0.75)  # at least one channel
    assert float(r.sink_share(torch.zeros(4))) == 0


def test_sizes():
    h = hidden(1)
    h[2, 1, 1, 1] = 1e6
    for layer in range(LAYERS):
        tokens = [h[layer, b, t].tolist() for b in range(BATCH) for t in range(TOKENS)]
        values = [v for token in tokens for v in token]
        sizes = sorted(map(abs, values), reverse=True)
        assert float(r.channel_variance(h)[layer]) == pytest.approx(mean(map(pvariance, tokens)), rel=1e-12)
        assert float(r.total_variance(h)[layer]) == pytest.approx(pvariance(values), rel=1e-12)
        assert float(r.mean_square(h)[layer]) == pytest.approx(mean(v * v for v in values), rel=1e-12)
        assert float(r.max_abs(h)[layer]) == sizes[0]
        assert r.top_abs(h, 4)[layer].tolist() == sizes[:4]
        assert float(r.median_abs(h)[layer]) == pytest.approx(median(sizes), rel=1e-12)
    assert r.massive(h).tolist() == [0, 0, 1, 0]
    assert r.massive(h[2]) == 1  # one layer alone


def test_the_median_of_an_odd_number():
    assert r.median_abs(torch.tensor([[[3.0, -1.0, 2.0]]])) == 2


def test_massive_needs_both_conditions():
    h = torch.ones(1, 1, 2001)
    h[..., 0] = 999.0  # above 100, but not above 1000 medians
    assert r.massive(h) == 0
    h[..., 0] = 1001.0
    assert r.massive(h) == 1
    assert r.massive(h * 0.05) == 0  # a large ratio of small values


def test_residual_sinks_stand_out_in_all_layers():
    h = hidden(2)
    h[..., 4] = -50.0
    sizes, channels = r.residual_sinks(h)
    assert channels[0] == 4
    assert float(sizes[0]) == 50
    for size, channel in zip(sizes.tolist(), channels.tolist(), strict=True):
        assert size == pytest.approx(h[..., channel].abs().mean().item())


def test_half_precision_does_not_overflow():
    h = torch.full((2, 1, 3, 4), 300.0, dtype=torch.float16)
    assert r.mean_square(h).tolist() == [9e4, 9e4]


def test_bad_input():
    with pytest.raises(ValueError, match="all or last"):
        r.angular_distance(hidden(), tokens="first")
    for n in (0, LAYERS):
        with pytest.raises(ValueError, match="1 <= n < L"):
            r.angular_distance(hidden(), n)
    with pytest.raises(ValueError, match="Stack"):
        r.block_influence(hidden()[0])
