"""What a step does, against the same in float64."""

import math

import pytest
import torch
from torch import nn

from trainkit.measure.updates import copies, moments, parameter_norm, update_ratio


def parameters():
    generator = torch.Generator().manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (3,), (2, 2))]
    return {"blocks.0.mlp": made[:2], "head": made[2:]}


def flat(groups, label=None):
    return torch.cat([p.detach().double().flatten() for k, ps in groups.items() if label in (None, k) for p in ps])


def test_the_ratio_is_the_way_over_the_length():
    groups = parameters()
    before, kept = copies(groups), parameters()
    with torch.no_grad():
        for p in (p for ps in groups.values() for p in ps):
            p.add_(0.01 * torch.randn_like(p))
    ratios, norms = update_ratio(before, groups), parameter_norm(groups)
    for name, label in (("blocks.0.mlp", "blocks.0.mlp"), ("head", "head"), ("global", None)):
        moved, length = (flat(groups, label) - flat(kept, label)).norm(), flat(kept, label).norm()
        assert float(ratios[name]) == pytest.approx(float(moved / length), rel=1e-4)
        assert float(norms[name]) == pytest.approx(float(flat(groups, label).norm()), rel=1e-6)
    assert float(ratios["blocks.0"]) == float(ratios["blocks.0.mlp"])


def test_zeros_that_stay_have_moved_by_nothing_and_others_infinitely_far():
    stays, moves = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    groups = {"stays": [stays], "moves": [moves]}
    before = copies(groups)
    with torch.no_grad():
        moves.fill_(1.0)
    found = update_ratio(before, groups)
    assert float(found["stays"]) == 0
    assert math.isinf(float(found["moves"]))


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (torch.optim.AdamW, {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.SGD(p, lr=0.1), set()),
    ],
)
def test_moments_go_by_the_optimizers_own_names(optimizer, states):
    groups = parameters()
    everything = [p for ps in groups.values() for p in ps]
    made = optimizer(everything)
    for p in everything:
        p.grad = torch.randn_like(p)
    made.step()
    found = moments(groups, made.state)
    assert set(found) == states
    for name, values in found.items():
        state = torch.cat([made.state[p][name].double().flatten() for p in groups["blocks.0.mlp"]])
        assert float(values["blocks.0.mlp"]) == pytest.approx(float(state.square().mean().sqrt()), rel=1e-5)
        assert set(values) == {"blocks.0.mlp", "blocks.0", "head", "global"}


def test_an_optimizer_that_has_not_stepped_has_no_moments():
    groups = parameters()
    assert moments(groups, torch.optim.AdamW([p for ps in groups.values() for p in ps]).state) == {}
