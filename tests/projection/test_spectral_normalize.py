"""Spectral normalization in training."""

import pytest
import torch

from trainkit.projection.spectral_normalize import SpectralNormalize

from .toy import Net, top, train

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("w_max", "sensitive"), [(1.0, True), (0.5, True), (0.5, False)])
def test_the_bound_holds_as_closely_as_the_iteration_finds_the_top(w_max, sensitive):
    model, bound = Net(), w_max if sensitive else 1.0
    projection, pressed = SpectralNormalize(w_max=w_max, sensitive_to_wmax=sensitive, iterations=100), 0
    for projected in train(model, torch.optim.Adam(model.parameters(), lr=0.05), projection, 25):
        if projected:
            assert max(map(top, model.matrices())) <= bound * 1.001
        else:
            pressed += max(map(top, model.matrices())) > 1.01 * bound
    assert pressed > 10


def test_weights_within_the_bound_keep_their_bits():
    model, projection = Net(), SpectralNormalize(w_max=50.0)
    projection(model)
    before = [p.detach().clone() for p in model.matrices()]
    projection(model)
    assert all(torch.equal(p, b) for p, b in zip(model.matrices(), before, strict=True))
