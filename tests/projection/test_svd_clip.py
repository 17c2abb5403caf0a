"""The exact clip in training, under an optimizer whose steps know nothing of it."""

import pytest
import torch

from trainkit.projection.svd_clip import SVDClip

from .toy import Net, top, train

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("w_max", "sensitive", "bound"), [(0.7, False, 0.7), (0.7, True, 0.49), (2.0, False, 2.0)])
def test_the_bound_holds_after_every_step(w_max, sensitive, bound):
    model, pressed = Net(), 0
    projection = SVDClip(w_max=w_max, sensitive_to_wmax=sensitive)
    for projected in train(model, torch.optim.Adam(model.parameters(), lr=0.05), projection, 60):
        if projected:
            assert max(map(top, model.matrices())) <= bound * (1 + 1e-12)
        else:
            pressed += max(map(top, model.matrices())) > bound
    assert pressed > 20


def test_clipping_twice_is_clipping_once():
    model, projection = Net(), SVDClip(w_max=0.3)
    projection(model)
    once = [p.detach().clone() for p in model.matrices()]
    projection(model)
    for p, q in zip(model.matrices(), once, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-13, atol=1e-13)
