"""Spectral weight decay: the largest singular value shrinks by its share every step, the others never."""

import pytest
import torch

from trainkit.projection.spectral_decay import SpectralDecay

from .toy import Net, with_values

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_only_the_largest_value_decays(rate):
    model, projection = Net(), SpectralDecay(rate=rate)
    for i, p in enumerate(model.matrices()):
        p.data = with_values(torch.tensor([5.0, 0.5, 0.3, 0.1]), *p.shape, seed=i)
    projection(model)
    for call in (1, 2):
        projection(model)
        for p in model.matrices():
            values = torch.linalg.svdvals(p.detach())
            first = 5 * (1 - rate) ** call
            if rate < 1:
                torch.testing.assert_close(values[:4], torch.tensor([first, 0.5, 0.3, 0.1]), rtol=1e-8, atol=1e-8)
            else:
                others = torch.tensor([[0.5, 0.3, 0.1], [0.3, 0.1, 0.0]][call - 1])
                torch.testing.assert_close(values[:3], others, rtol=2e-3, atol=2e-3)


def test_bad_input():
    with pytest.raises(ValueError, match=r"no bound to clip at: projection.start is keep or orthogonal"):
        SpectralDecay(start="clip")
    for rate in (-0.1, 1.5):
        with pytest.raises(ValueError, match=rf"in \[0, 1\]; got {rate}"):
            SpectralDecay(rate=rate)
