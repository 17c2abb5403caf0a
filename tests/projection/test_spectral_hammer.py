"""The hammer sets the largest singular value, from above and from below."""

import pytest
import torch

from trainkit.projection.spectral_hammer import SpectralHammer

from .toy import Net, top, with_values

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize(("w_max", "sensitive", "goal"), [(2.0, False, 2.0), (2.0, True, 4.0)])
@pytest.mark.parametrize("first", [1.5, 5.0])
def test_the_largest_value_becomes_the_bound_and_the_others_stay(w_max, sensitive, goal, first):
    model, projection = Net(), SpectralHammer(w_max=w_max, sensitive_to_wmax=sensitive, start="keep")
    values = torch.tensor([first, 0.5, 0.3, 0.1])
    for i, p in enumerate(model.matrices()):
        c = (p.shape[0] / p.shape[1]) ** 0.5
        p.data = c * with_values(values, *p.shape, seed=i)
    projection(model)
    projection(model)
    for p in model.matrices():
        c = (p.shape[0] / p.shape[1]) ** 0.5
        expected = torch.tensor([goal, 0.5, 0.3, 0.1])
        torch.testing.assert_close(torch.linalg.svdvals(p.detach() / c)[:4], expected, rtol=1e-9, atol=1e-9)
        assert abs(top(p) - goal) < 1e-9
    once = [p.detach().clone() for p in model.matrices()]
    projection(model)
    for p, q in zip(model.matrices(), once, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=1e-9, atol=1e-9)
