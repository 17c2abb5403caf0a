"""Every schedule peaks at 1, follows its formula, and reaches its end at `total`."""

from math import cos, pi

import pytest

from tests.menu import build, options


@pytest.mark.parametrize("name", sorted({*options("schedule")} - {"refined"}))  # its warm-up comes from the norms
@pytest.mark.parametrize("warmup", [0, 0.1, 30])
def test_the_peak_is_one_and_nothing_is_negative(name, warmup):
    schedule = build("schedule", f"schedule={name}", f"schedule.warmup={warmup}")(total=300)
    factors = [schedule(step) for step in range(301)]
    assert max(factors) == 1.0
    assert min(factors) >= 0
    assert factors[0] > 0


@pytest.mark.parametrize(("name", "end"), [("constant", 1.0), ("linear", 0.0), ("cosine", 0.1), ("wsd", 0.0)])
def test_the_end_is_reached_at_total_and_kept(name, end):
    schedule = build("schedule", f"schedule={name}")(total=200)
    assert schedule(200) == pytest.approx(end, abs=1e-12)
    assert schedule(500) == pytest.approx(end, abs=1e-12)


def test_formulas():
    cosine = build("schedule", "schedule=cosine", "schedule.warmup=10", "schedule.final=0.2")(total=110)
    assert cosine(4) == 0.5
    assert cosine(35) == pytest.approx(0.2 + 0.8 * (1 + cos(pi * 0.25)) / 2)
    linear = build("schedule", "schedule=linear", "schedule.warmup=0")(total=100)
    assert linear(25) == 0.75
    wsd = build("schedule", "schedule=wsd", "schedule.warmup=0", "schedule.decay=0.5")(total=100)
    assert (wsd(50), wsd(75)) == (1.0, 0.5)
    root = build("schedule", "schedule=inverse_sqrt", "schedule.warmup=10")(total=100)
    assert root(4) == 0.5
    assert [root(n - 1) for n in (10, 40, 90)] == [1.0, 0.5, pytest.approx(1 / 3)]  # sqrt(W / n)
    slow = build("schedule", "schedule=inverse_sqrt", "schedule.warmup=10", "schedule.timescale=30")(total=100)
    assert slow(99) == pytest.approx(0.5)
    assert build("schedule", "schedule=inverse_sqrt", "schedule.warmup=0")(total=100)(15) == 0.25


def test_a_longer_run_goes_on_as_a_shorter_one_began():
    """The inverse square root does not know where the run ends."""
    short, long = (build("schedule", "schedule=inverse_sqrt", "schedule.warmup=10")(total=n) for n in (50, 5000))
    assert [short(step) for step in range(50)] == [long(step) for step in range(50)]


def test_a_timescale_of_no_step_is_refused():
    with pytest.raises(ValueError, match=r"schedule\.timescale must be at least one step; got 0"):
        build("schedule", "schedule=inverse_sqrt", "schedule.timescale=0")(total=100)


def test_a_length_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match=r"schedule\.warmup must lie between 0 and the run's 100 steps; got 200"):
        build("schedule", "schedule=linear", "schedule.warmup=200")(total=100)
