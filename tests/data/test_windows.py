"""Which tokens make which batch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.windows import gather, shuffled, spread, windows_per_epoch


@st.composite
def texts(draw):
    """A length and a context of which at least one window fits."""
    context = draw(st.integers(1, 40))
    return draw(st.integers(context + 1, 1500)), context


@given(texts(), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_an_epoch_is_a_permutation_of_windows_at_one_phase(text, seed, epoch):
    tokens, context = text
    starts = shuffled(tokens, context, seed=seed, epoch=epoch)
    phase = starts.min()
    assert 0 <= phase < context
    assert sorted(starts) == [phase + i * context for i in range(windows_per_epoch(tokens, context))]
    assert starts.max() + context + 1 <= tokens
    # At most the two windows that the phase may push over the edge are missing.
    assert (tokens - 1) // context - 1 <= max(len(starts), 1) <= (tokens - 1) // context


def test_the_order_follows_from_seed_and_epoch_alone():
    one = [shuffled(10_000, 16, seed=seed, epoch=epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    two = [shuffled(10_000, 16, seed=seed, epoch=epoch) for seed, epoch in ((1, 0), (0, 1), (0, 0))]
    for a, b in zip(one, reversed(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not (one[0] == one[1]).all()
    assert not (one[0] == one[2]).all()


def test_the_order_is_kept_by_other_versions_of_numpy():
    pinned = [39, 48, 75, 21, 12, 3, 84, 66, 30, 57]
    assert shuffled(100, 9, seed=1, epoch=2).tolist() == pinned


def test_every_phase_occurs_and_no_window_keeps_its_place():
    starts = np.array([shuffled(16 * 40, 16, seed=0, epoch=epoch) for epoch in range(300)])
    assert set(starts.min(axis=1)) == set(range(16))
    assert (starts // 16 == starts[0] // 16).mean() < 0.1


@pytest.mark.parametrize(("tokens", "context"), [(0, 4), (4, 4), (1, 1)])
def test_no_window_fits_a_text_shorter_than_one_context(tokens, context):
    assert windows_per_epoch(tokens, context) == 0


@given(texts(), st.integers(1, 200))
def test_evaluation_windows_share_no_target_and_reach_over_the_whole_text(text, count):
    tokens, context = text
    starts = spread(tokens, context, count)
    available = (tokens - 1) // context
    assert len(starts) == min(count, available)
    assert starts[-1] + context + 1 <= tokens
    if len(starts) > 1:
        gaps = np.diff(starts)
        assert gaps.min() >= context
        assert gaps.max() - gaps.min() <= context
        assert tokens - starts[-1] <= gaps.max() + 2 * context


@given(texts(), st.data(), st.sampled_from(["uint8", "uint16", "uint32"]))
def test_targets_are_the_inputs_one_token_later(text, data, dtype):
    tokens, context = text
    array = np.random.default_rng(tokens).integers(0, np.iinfo(dtype).max, tokens, dtype=dtype, endpoint=True)
    starts = np.array(data.draw(st.lists(st.integers(0, tokens - context - 1), min_size=1, max_size=8)))
    inputs, targets = gather(array, starts, context)
    for row, start in enumerate(starts):
        assert inputs[row].tolist() == array[start : start + context].tolist()
        assert targets[row].tolist() == array[start + 1 : start + context + 1].tolist()
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
