"""The hard cap in training."""

import pytest

from trainkit.projection.hard_cap import HardCap

from .toy import Net, muon, top, train

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("w_max", "sensitive"), [(1.0, True), (0.5, True), (4.0, True), (4.0, False)])
def test_the_bound_holds_after_every_step(w_max, sensitive):
    model, bound = Net(), w_max if sensitive else 1.0
    pressed = 0
    for projected in train(model, muon(model, lr=0.2 * bound), HardCap(w_max=w_max, sensitive_to_wmax=sensitive), 60):
        if projected:
            assert max(map(top, model.matrices())) <= 1.011 * bound
        else:
            pressed += max(map(top, model.matrices())) > 1.05 * bound
    assert pressed > 20
