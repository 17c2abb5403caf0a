"""The soft cap in training: what its coupling bounds, and what the released coupling does not."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from tests.menu import build
from trainkit.projection.soft_cap import SoftCap
from trainkit.projection.spectral import SIX, coupling, released_coupling

from .toy import Net, muon, top, train

pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("w_max", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_bound_holds_after_every_step(w_max, sensitive, decay):
    model = Net()
    projection = SoftCap(w_max=w_max, sensitive_to_wmax=sensitive, start="orthogonal" if w_max == 1 else "clip")
    pressed = 0
    for projected in train(model, muon(model, lr=0.1 * w_max, weight_decay=decay), projection, 60):
        if projected:
            assert max(map(top, model.matrices())) <= w_max * (1 + 1e-9)
        else:
            pressed += max(map(top, model.matrices())) > w_max
    assert pressed > 20  # without the projection the bound would have been left


def test_units_do_not_matter_to_the_exact_coupling():
    results = []
    for sensitive in (True, False):
        torch.manual_seed(0)
        model = Net()
        projection = SoftCap(w_max=0.7, sensitive_to_wmax=sensitive)
        for _ in train(model, muon(model, lr=0.1, weight_decay=0.1), projection, 10):
            pass
        results.append([p.detach().clone() for p in model.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_released_coupling_leaves_the_bound_where_the_exact_one_does_not():
    largest = {}
    for kind in ("exact", "released"):
        torch.manual_seed(0)
        model = Net()
        projection = SoftCap(w_max=2.0, coupling=kind)
        optimizer = muon(model, lr=0.1)
        largest[kind] = max(max(map(top, model.matrices())) for on in train(model, optimizer, projection, 60) if on)
    assert largest["exact"] <= 2 * (1 + 1e-9) < largest["released"]


def test_alpha_follows_the_schedule_and_each_parameters_group():
    model, projection = Net(), SoftCap(w_max=1.0, start="keep")
    optimizer = torch.optim.SGD(
        [
            {"params": model.matrices()[:1], "lr": 0.2, "weight_decay": 0.1},
            {"params": model.matrices()[1:3], "lr": 0.1, "weight_decay": 0.0},
        ]
    )
    schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
    projection.prepare(optimizer)
    projection(model)
    for step in range(3):
        before = [p.detach().clone() for p in model.matrices()]
        projection(model)
        for i, (p, b) in enumerate(zip(model.matrices(), before, strict=True)):
            lr, decay = ((0.2, 0.1), (0.1, 0.0), (0.1, 0.0), (0.0, 0.0))[i]
            lr /= 1 + step
            c = (p.shape[0] / p.shape[1]) ** 0.5
            alpha = coupling(1.0, lr * decay, lr)
            u, s, vh = torch.linalg.svd(b / c, full_matrices=False)
            s = s - alpha * s**3
            expected = c * (u * (s + alpha * s**3)) @ vh
            torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)
            assert torch.equal(p, b) == (i == 3)  # no group steps the last one
        optimizer.step()
        schedule.step()


def test_released_coupling_divides_the_update_by_the_scale():
    model, projection = Net(), SoftCap(w_max=2.0, coupling="released", start="keep", update_norm=1.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    projection.prepare(optimizer)
    projection(model)
    before = [p.detach().clone() for p in model.matrices()]
    projection(model)
    for p, b in zip(model.matrices(), before, strict=True):
        c = (p.shape[0] / p.shape[1]) ** 0.5
        alpha = released_coupling(2.0, 0.1 * 0.1, 0.1 * 1.1 / c)
        u, s, vh = torch.linalg.svd(b / (2 * c), full_matrices=False)
        s = s - alpha * s**3
        torch.testing.assert_close(p.detach(), 2 * c * (u * (s + alpha * s**3)) @ vh, rtol=1e-11, atol=1e-12)


def test_a_learning_rate_of_zero_moves_nothing():
    model, projection = Net(), SoftCap()
    projection.prepare(torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.1))
    projection(model)
    before = [p.detach().clone() for p in model.matrices()]
    projection(model)
    assert all(torch.equal(p, b) for p, b in zip(model.matrices(), before, strict=True))


def test_bad_input():
    with pytest.raises(ValueError, match=r"projection.coupling is exact or released; got 'loose'"):
        SoftCap(coupling="loose")
    for key in ("alpha", "update_norm"):
        with pytest.raises(ValueError, match=f"projection.{key} must not be negative; got -1"):
            SoftCap(**{key: -1.0})
    projection, model = SoftCap(), Net()
    projection(model)
    with pytest.raises(ValueError, match=r"coupled to the learning rate: call its prepare\(optimizer\)"):
        projection(model)


def test_the_menu_gives_muon_the_updates_that_the_cap_bounds():
    optimizer = build("optimizer", "projection=soft_cap", "optimizer=muon").keywords
    assert [tuple(triple) for triple in optimizer["coefficients"]] == list(SIX)
    assert (optimizer["steps"], optimizer["nesterov"], optimizer["scale"]) == (6, False, "ratio")
    assert "coefficients" not in build("optimizer", "projection=soft_cap").keywords
