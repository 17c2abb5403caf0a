"""The order that is computed place by place is a permutation, and looks like a random one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.order import Order


def order(count, seed=0):
    return Order(count, np.random.PCG64(np.random.SeedSequence(seed)))


@given(st.integers(1, 5000), st.integers(0, 2**32))
def test_every_item_comes_once(count, seed):
    items = order(count, seed)(np.arange(count))
    assert items.dtype == np.int64
    np.testing.assert_array_equal(np.sort(items), np.arange(count))


@pytest.mark.parametrize("count", [2**20 - 1, 2**20, 2**20 + 1, 1024**2 + 1025])
def test_every_item_comes_once_where_digits_are_full(count):
    np.testing.assert_array_equal(np.sort(order(count)(np.arange(count))), np.arange(count))


@given(st.integers(2**40, 2**52), st.integers(0, 2**32), st.integers(0, 2**39))
def test_billions_of_items_are_in_range_and_apart(count, seed, first):
    items = order(count, seed)(np.arange(first, first + 500))
    assert items.min() >= 0
    assert items.max() < count
    assert len(set(items.tolist())) == 500


def test_an_item_is_the_same_whatever_is_asked_with_it():
    whole = order(10_007)(np.arange(10_007))
    np.testing.assert_array_equal(order(10_007)(np.array([77, 3, 9999])), whole[[77, 3, 9999]])


def test_the_order_is_kept_by_other_versions_of_numpy():
    pinned = [263, 842, 125, 890, 692, 814, 522, 57]
    assert order(1000, [1, 2])(np.arange(8)).tolist() == pinned


@pytest.mark.parametrize("count", [3, 6, 13, 64])
def test_each_item_is_equally_likely_at_each_place(count):
    seen, draws = np.zeros((count, count)), 3000
    for seed in range(draws):
        seen[np.arange(count), order(count, seed)(np.arange(count))] += 1
    expected = draws / count
    freedom = (count - 1) ** 2
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)  # five standard deviations of chi-squared


@pytest.mark.parametrize("count", [1000, 10**6 + 3, 10**12])
def test_neighbours_in_the_order_have_nothing_to_do_with_each_other(count):
    """Of n pairs, a correlation has the standard deviation 1 / sqrt(n) where there is none."""
    n = min(count, 100_000)
    items = order(count)(np.arange(n)) / count
    for lag in (1, 2, 31, 32, 999 if count > 1000 else 500):
        assert abs(np.corrcoef(items[:-lag], items[lag:])[0, 1]) < 5 / np.sqrt(n - lag)
    assert abs(np.corrcoef(items, np.arange(n))[0, 1]) < 5 / np.sqrt(n)
    other = order(count, 1)(np.arange(n)) / count
    assert abs(np.corrcoef(items, other)[0, 1]) < 5 / np.sqrt(n)
    # Steps from an item to the next, as a share of all: those of independent places are spread as 2 (1 - d).
    steps = np.abs(np.diff(items))
    assert abs(steps.mean() - 1 / 3) < 5 * np.sqrt(1 / 18 / n)
    assert abs((steps < 0.1).mean() - 0.19) < 5 * np.sqrt(0.19 * 0.81 / n)
