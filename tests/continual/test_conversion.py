"""What every strategy that replaces BatchNorm keeps of it, refuses, and leaves running."""

import copy

import pytest
import torch
from torch import nn

from trainkit.continual.adab2n import AdaB2NStrategy
from trainkit.continual.batch_renorm import BatchRenormStrategy
from trainkit.continual.cn import ContinualNormStrategy
from trainkit.continual.ghost_bn import GhostBatchNormStrategy
from trainkit.continual.group import GroupNormStrategy
from trainkit.continual.strategy import Strategy
from trainkit.continual.task_bn import TaskBatchNormStrategy
from trainkit.norm_layer.adab2n import AdaB2N
from trainkit.norm_layer.batch import batch
from trainkit.norm_layer.batch_renorm import BatchRenorm
from trainkit.norm_layer.continual_norm import ContinualNorm
from trainkit.norm_layer.ghost_batch import GhostBatchNorm
from trainkit.norm_layer.group import GroupNorm
from trainkit.norm_layer.prep_batch import PRepBN
from trainkit.norm_layer.task_batch import TaskBatchNorm

from .layers import float64, perturbed  # noqa: F401

STRATEGIES = {
    "adab2n": (AdaB2NStrategy, {"tasks": 2}, AdaB2N),
    "batch_renorm": (BatchRenormStrategy, {}, BatchRenorm),
    "cn": (ContinualNormStrategy, {"groups": 4}, ContinualNorm),
    "ghost_bn": (GhostBatchNormStrategy, {"ghost": 3}, GhostBatchNorm),
    "group": (GroupNormStrategy, {"groups": 4}, GroupNorm),
    "task_bn": (TaskBatchNormStrategy, {"tasks": 2}, TaskBatchNorm),
}
names = pytest.mark.parametrize("name", STRATEGIES)
KEEPS_EVALUATION = ("adab2n", "batch_renorm", "ghost_bn", "task_bn")
WIDTH, OTHER = 8, 12


def strategy(name: str, **knobs) -> Strategy:
    kind, given, _ = STRATEGIES[name]
    return kind(**{**given, **knobs})


def network(**knobs) -> nn.Sequential:
    """Images -> pixels' mean -> a row: BatchNorms on axis 1 and on the last one, with a past."""
    parts = nn.Conv2d(3, WIDTH, 3), batch(WIDTH, axis=1, **knobs), nn.ReLU(), nn.Flatten(2), Mean()
    model = nn.Sequential(*parts, nn.Linear(WIDTH, OTHER), nn.Sequential(batch(OTHER, **knobs)))
    perturbed(model)
    for _ in range(3):
        model(torch.randn(5, 3, 6, 6))
    return model


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(-1)


@names
def test_both_axes_are_converted_with_everything_they_hold(name):
    model = network(eps=1e-3, momentum=0.2)
    original = copy.deepcopy(model).eval()
    bns = [model[1], model[6][0]]
    parameters = [p for bn in bns for p in bn.parameters()]
    plugin = strategy(name)
    converted = plugin.convert(model)
    layers = [converted[1], converted[6][0]]
    assert {type(layer) for layer in layers} == {STRATEGIES[name][2]}
    assert [layer.axis for layer in layers] == [1, -1]
    assert all(layer.eps == 1e-3 for layer in layers)
    assert all(getattr(layer, "momentum", 0.2) == 0.2 for layer in layers)
    if name != "task_bn":
        kept = {id(p) for layer in layers for p in layer.parameters()}
        assert all(id(p) in kept for p in parameters)
    x = torch.randn(4, 3, 6, 6)
    if name in KEEPS_EVALUATION:
        assert torch.allclose(converted.eval()(x), original(x), rtol=1e-9, atol=1e-12)
        converted.train()
    plugin.begin_task(converted, 0)
    plugin.begin_batch(converted, torch.zeros(4, dtype=torch.long))
    y = converted(x)
    (y.square().sum() + plugin.penalty(converted)).backward()
    assert y.isfinite().all()
    assert all(p.grad is not None for p in converted.parameters())


@names
def test_a_bare_batch_norm_and_those_of_torch(name):
    assert type(strategy(name).convert(batch(WIDTH, axis=1))) is STRATEGIES[name][2]
    model = strategy(name).convert(nn.Sequential(nn.Conv2d(3, WIDTH, 1), nn.BatchNorm2d(WIDTH)))
    assert type(model[1]) is STRATEGIES[name][2]
    assert model[1].axis == 1


@names
def test_counting_mode_and_dtype_are_kept(name):
    bn = batch(WIDTH, axis=1, count="step").to(torch.bfloat16).eval()
    layer = strategy(name).convert(nn.Sequential(bn))[0]
    assert not layer.training
    assert getattr(layer, "count", "step") == "step"
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in layer.buffers() if b.is_floating_point()} <= {torch.float64}


@names
def test_a_model_without_batch_norm_is_refused(name):
    with pytest.raises(
        ValueError, match=f"^continual={name} needs BatchNorm; the model has none. Try norm_layer=batch"
    ):
        strategy(name).convert(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))


@names
def test_batch_norms_that_cannot_be_taken_over(name):
    with pytest.raises(ValueError, match=r"the model's are parts of RepBN\. Try norm_layer=batch"):
        strategy(name).convert(nn.Sequential(PRepBN(WIDTH)))
    with pytest.raises(ValueError, match="one without weight and bias"):
        strategy(name).convert(nn.Sequential(nn.BatchNorm2d(WIDTH, affine=False)))
    with pytest.raises(ValueError, match="one without running statistics"):
        strategy(name).convert(nn.Sequential(nn.BatchNorm2d(WIDTH, track_running_stats=False)))


@names
def test_state_goes_into_a_file_and_back(name):
    plugin, other = strategy(name), strategy(name)
    a, b = plugin.convert(network()), other.convert(network())
    for model in (a, b):  # b somewhere else entirely
        plugin.begin_task(model, 1)
        plugin.begin_batch(model, torch.tensor([0, 1, 1, 0]))
        model(torch.randn(4, 3, 6, 6))
    b.load_state_dict(a.state_dict())
    x, ids = torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 0])
    for training in (True, False, True):
        for model in (a, b):
            plugin.begin_batch(model.train(training), ids)
        assert torch.equal(a(x), b(x))


@pytest.mark.parametrize("name", ["cn", "group"])
@pytest.mark.parametrize(("width", "groups"), [(64, 32), (20, 4), (40, 8), (80, 16), (7, 1)])
def test_groups_that_do_not_divide_are_as_many_as_do(name, width, groups):
    layer = strategy(name, groups=32).convert(batch(width, axis=1))
    assert layer.groups == groups


@pytest.mark.parametrize(
    ("name", "knobs", "message"),
    [
        ("cn", {"groups": 0}, "continual.groups must be at least 1; got 0"),
        ("group", {"groups": 0}, "continual.groups must be at least 1; got 0"),
        ("ghost_bn", {"ghost": 0}, "continual.ghost must be at least 1; got 0"),
        ("adab2n", {"lambda_reg": -1}, "continual.lambda_reg must be at least 0; got -1"),
    ],
)
def test_settings_without_sense(name, knobs, message):
    with pytest.raises(ValueError, match=message):
        strategy(name, **knobs)


def test_ghosts_and_synchronized_statistics_contradict():
    with pytest.raises(ValueError, match=r"statistics apart, in each rank; set norm_layer\.sync=none"):
        strategy("ghost_bn").convert(nn.Sequential(batch(WIDTH, sync="mean")))


@pytest.mark.parametrize(
    ("knob", "bn", "found"), [("mean", "none", "mean"), (None, "mean", "mean"), (None, "none", "none")]
)
def test_whose_synchronization_holds(knob, bn, found):
    assert strategy("adab2n", sync=knob).convert(batch(WIDTH, sync=bn)).sync == found
