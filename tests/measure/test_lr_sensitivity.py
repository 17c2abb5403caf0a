"""LR sensitivity against NumPy's arithmetic in float64, and its properties."""

import math

import numpy as np
import pytest

from trainkit.measure.lr_sensitivity import lr_sensitivity


def test_it_is_the_mean_excess_over_the_best_with_losses_bounded_by_the_first():
    draw = np.random.default_rng(0)
    for _ in range(50):
        losses = draw.uniform(1.0, 9.0, size=draw.integers(1, 12))
        start = draw.uniform(2.0, 8.0)
        bounded = np.minimum(losses, start)
        assert lr_sensitivity(losses.tolist(), start) == pytest.approx((bounded - bounded.min()).mean(), abs=1e-12)


def test_a_case_by_hand():
    # min(l, 5) = 3, 2, 4, 5, 5; their mean 3.8; the best 2
    assert lr_sensitivity([3.0, 2.0, 4.0, 7.0, math.nan], 5.0) == pytest.approx(1.8)


def test_what_diverges_counts_as_the_loss_at_initialization():
    expected = lr_sensitivity([2.0, 5.0], 5.0)
    for diverged in (math.nan, math.inf, 5.0, 1e30):
        assert lr_sensitivity([2.0, diverged], 5.0) == expected == 1.5


def test_a_flat_curve_and_one_that_never_learns_have_none():
    assert lr_sensitivity([2.5] * 4, 5.0) == 0.0
    assert lr_sensitivity([math.nan, 9.0], 5.0) == 0.0


def test_it_moves_with_the_losses_and_not_with_their_level():
    losses = [2.0, 2.5, 4.0]
    assert lr_sensitivity([loss + 1 for loss in losses], 9.0) == pytest.approx(lr_sensitivity(losses, 8.0))
    assert lr_sensitivity([2 * loss for loss in losses], 16.0) == pytest.approx(2 * lr_sensitivity(losses, 8.0))


def test_of_nothing():
    with pytest.raises(ValueError, match="at least one loss"):
        lr_sensitivity([], 1.0)
