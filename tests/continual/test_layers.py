"""Ghost batch norm, batch renorm and continual norm against their equations."""

import copy

import pytest
import torch
from torch import nn

from trainkit.norm_layer.batch_renorm import BatchRenorm
from trainkit.norm_layer.continual_norm import ContinualNorm
from trainkit.norm_layer.ghost_batch import GhostBatchNorm
from trainkit.norm_layer.stateful import advance

from .layers import WIDTH, equal, float64, images, on_ranks, perturbed, step  # noqa: F401

EPS = 1e-5


def column(values):
    return values[:, None, None]


# --- ghosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "sizes", "knobs"),
    [
        (8, [4, 4], {"ghost": 4}),
        (10, [4, 4, 2], {"ghost": 3}),
        (7, [2, 2, 2, 1], {"chunks": 4}),
        (3, [3], {"ghost": 128}),
        (3, [1, 1, 1], {"chunks": 9}),
    ],
)
def test_each_ghost_is_batch_normalized_by_itself(samples, sizes, knobs):
    layer = perturbed(GhostBatchNorm(WIDTH, axis=1, **knobs))
    torchs = nn.BatchNorm2d(WIDTH)
    torchs.load_state_dict(layer.state_dict())
    for _ in range(2):
        x, gy = images(samples)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(a)
        y.backward(gy)
        z = torch.cat([torchs(piece) for piece in b.split(sizes)])
        z.backward(gy)
        assert equal(y, z)
        assert equal(a.grad, b.grad)
        for (name, found), expected in zip(layer.state_dict().items(), torchs.state_dict().values(), strict=True):
            assert equal(found.double(), expected.double()), name
    for p, q in zip(layer.parameters(), torchs.parameters(), strict=True):
        assert equal(p.grad, q.grad)
    x, _ = images(5)
    assert equal(layer.eval()(x), torchs.eval()(x))


def test_order_within_a_ghost_does_not_matter_but_between_them_it_does():
    layer, (x, _) = GhostBatchNorm(WIDTH, axis=1, ghost=4), images(8)
    inside, across = [3, 1, 0, 2, 7, 6, 5, 4], [0, 4, 1, 5, 2, 6, 3, 7]
    y = layer(x)
    assert equal(layer(x[inside]), y[inside])
    assert not torch.allclose(layer(x[across]), y[across], atol=0.01)


def test_a_step_takes_the_mean_over_ghosts():
    layer, (x, _) = GhostBatchNorm(WIDTH, axis=1, ghost=4, count="step"), images(8)
    layer(x)
    assert not layer.running_mean.any()
    advance(layer)
    assert equal(layer.running_mean, 0.1 * x.mean((0, 2, 3)))
    assert int(layer.num_batches_tracked) == 1


@pytest.mark.parametrize("knobs", [{"ghost": 0}, {"chunks": 0}])
def test_ghosts_of_nothing(knobs):
    with pytest.raises(ValueError, match=f"{next(iter(knobs))} must be at least 1; got 0"):
        GhostBatchNorm(WIDTH, **knobs)


# --- batch renorm -----------------------------------------------------------------------------------------------------

OPEN = {"r_ramp": [0, 0], "d_ramp": [0, 0], "count": "call"}


def renormalized(layer, x, r_max, d_max):
    """y, mean and std of the batch, by the text of the reference."""
    mean = x.mean((0, 2, 3))
    std = ((x - column(mean)).square().mean((0, 2, 3)) + EPS).sqrt()
    r = (std / layer.running_std).clamp(1 / r_max, r_max).detach()
    d = ((mean - layer.running_mean) / layer.running_std).clamp(-d_max, d_max).detach()
    z = (x - column(mean)) / column(std) * column(r) + column(d)
    return z * column(layer.weight) + column(layer.bias), mean.detach(), std.detach()


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.2, 0.1), (3.0, 5.0), (100.0, 100.0)])
def test_renorm_equations(r_max, d_max):
    layer = perturbed(BatchRenorm(WIDTH, axis=1, r_max=r_max, d_max=d_max, momentum=0.3, **OPEN))
    twin = copy.deepcopy(layer)
    for _ in range(3):
        x, gy = images(4)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y = layer(a)
        y.backward(gy)
        z, mean, std = renormalized(twin, b, r_max, d_max)
        z.backward(gy)
        twin.running_mean.lerp_(mean, 0.3)
        twin.running_std.lerp_(std, 0.3)
        assert equal(y, z)
        assert equal(a.grad, b.grad)
        assert equal(layer.running_mean, twin.running_mean)
        assert equal(layer.running_std, twin.running_std)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert equal(p.grad, q.grad)
    x, _ = images(5)
    scaled = (x - column(twin.running_mean)) / column(twin.running_std)
    assert equal(layer.eval()(x), scaled * column(twin.weight) + column(twin.bias))
    a, c = layer.scale_shift()
    assert equal(layer(x), x * column(a) + column(c))


def test_without_bounds_training_is_evaluation():
    layer = perturbed(BatchRenorm(WIDTH, axis=1, r_max=1e9, d_max=1e9, **OPEN))
    layer(images(4)[0])
    x, _ = images(4)
    expected = copy.deepcopy(layer).eval()(x)
    assert equal(layer(x), expected)


def test_bounds_open_over_the_ramps():
    layer = BatchRenorm(WIDTH, axis=1, r_ramp=[1, 3], d_ramp=[2, 6], momentum=0.5, count="step")
    for r_max, d_max in ((1, 0), (1, 0), (2, 0), (3, 1.25), (3, 2.5)):
        x = 7 * images(4)[0] + 20  # beyond every bound
        y, *_ = renormalized(layer, x, r_max, d_max)
        for _ in range(2):  # of one step
            assert equal(layer(x), y)
        advance(layer)
        layer.running_mean.zero_()
        layer.running_std.fill_(1)


def test_renorm_resumes():
    layer = BatchRenorm(WIDTH, axis=1, r_ramp=[0, 4], d_ramp=[0, 4], count="call")
    layer(images(4)[0])
    other = BatchRenorm(WIDTH, axis=1, r_ramp=[0, 4], d_ramp=[0, 4], count="call")
    other.load_state_dict(layer.state_dict())
    x, _ = images(4)
    assert torch.equal(layer(x), other(x))


def test_renorm_of_one_position_changes_nothing():
    layer = perturbed(BatchRenorm(WIDTH, **OPEN))
    layer(torch.randn(5, WIDTH))
    before, x = copy.deepcopy(layer), torch.randn(1, WIDTH)
    y, gx = step(layer, x, torch.ones_like(x))
    assert equal(y, copy.deepcopy(before).eval()(x))
    assert equal(gx[0], layer.scale_shift()[0])
    assert torch.equal(layer.running_std, before.running_std)
    assert int(layer.steps) == 1


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"r_max": 0.5}, "r_max of at least 1"),
        ({"d_max": -1}, "d_max of at least 0"),
        ({"r_ramp": [5, 3]}, r"r_ramp is \[first step, last step\] of a ramp; got \[5, 3\]"),
    ],
)
def test_bounds_without_sense(knobs, message):
    with pytest.raises(ValueError, match=message):
        BatchRenorm(WIDTH, **knobs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_renorm_in_half_precision(dtype):
    layer = perturbed(BatchRenorm(WIDTH, axis=1, **OPEN)).float().to(dtype)
    reference, (x, gy) = copy.deepcopy(layer).double(), images(4)
    y, gx = step(layer, (1000 * x).to(dtype), gy.to(dtype))
    expected = step(reference, (1000 * x).to(dtype).double(), gy.to(dtype).double())
    assert torch.allclose(y.double(), expected[0], rtol=0.03, atol=0.03)
    assert torch.allclose(gx.double(), expected[1], rtol=0.05, atol=1e-3)
    assert torch.allclose(layer.running_std.double(), reference.running_std, rtol=1e-5)


SHARES = [1, 3]


def outcome(rank: int | None) -> dict:
    torch.manual_seed(1)
    results = []
    sync = "none" if rank is None else "mean"
    layers = [
        perturbed(BatchRenorm(WIDTH, axis=1, sync=sync, **OPEN)),
        perturbed(ContinualNorm(WIDTH, axis=1, groups=2, sync=sync)),
    ]
    for _ in range(2):
        x, gy = (v if rank is None else v.split(SHARES)[rank] for v in images(4))
        for layer in layers:
            results += step(layer, x, gy)
    state = [value for layer in layers for value in layer.state_dict().values()]
    return {"rows": results, "gradients": [p.grad for layer in layers for p in layer.parameters()], "state": state}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    parts, whole = on_ranks(outcome, tmp_path), outcome(None)
    for expected, *found in zip(whole["rows"], *(part["rows"] for part in parts), strict=True):
        assert equal(torch.cat(found), expected)
    for expected, *found in zip(whole["gradients"], *(part["gradients"] for part in parts), strict=True):
        assert equal(sum(found), expected)
    for part in parts:
        assert all(equal(a.double(), b.double()) for a, b in zip(part["state"], whole["state"], strict=True))


# --- continual norm ---------------------------------------------------------------------------------------------------


def plain_group(x, groups):
    h = x.unflatten(1, (groups, -1)).flatten(2)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, correction=0, keepdim=True) + EPS).sqrt()
    return h.view(x.shape)


@pytest.mark.parametrize("groups", [1, 2, WIDTH])
def test_continual_is_group_then_batch(groups):
    layer = perturbed(ContinualNorm(WIDTH, axis=1, groups=groups))
    torchs = nn.BatchNorm2d(WIDTH)
    torchs.load_state_dict(layer.state_dict())
    for _ in range(2):
        x, gy = images(4)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(a), torchs(plain_group(b, groups))
        y.backward(gy)
        z.backward(gy)
        assert equal(y, z)
        assert equal(a.grad, b.grad)
    assert equal(layer.running_mean, torchs.running_mean)
    assert equal(layer.running_var, torchs.running_var)
    assert int(layer.num_batches_tracked) == 0
    x, _ = images(3)
    assert equal(layer.eval()(x), torchs.eval()(plain_group(x, groups)))


@pytest.mark.parametrize("training", [True, False])
def test_brightness_and_contrast_of_a_sample_do_not_matter(training):
    layer = ContinualNorm(WIDTH, axis=1, groups=2, eps=1e-12).train(training)
    x, _ = images(4)
    changed = x * torch.tensor([1, 2, 3, 0.5])[:, None, None, None] + torch.randn(4, 1, 1, 1)
    assert torch.allclose(layer(changed), layer(x), atol=1e-8)


def test_the_mean_of_all_batches():
    layer, means = ContinualNorm(WIDTH, axis=1, groups=2, momentum=None), []
    for _ in range(3):
        x, _ = images(4)
        layer(x)
        means.append(plain_group(x, 2).mean((0, 2, 3)))
    assert equal(layer.running_mean, torch.stack(means).mean(0))


def test_continual_norm_is_not_folded():
    with pytest.raises(ValueError, match="no fixed affine map: its group norm"):
        ContinualNorm(WIDTH, groups=2).scale_shift()


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="groups must divide the width 6; got 4"):
        ContinualNorm(WIDTH, groups=4)


@pytest.mark.parametrize("layer", [BatchRenorm(WIDTH), GhostBatchNorm(WIDTH), ContinualNorm(WIDTH, groups=2)])
def test_another_width(layer):
    with pytest.raises(ValueError, match=r"built for 6 channels on axis -1; got an input of shape \(2, 3, 7\)"):
        layer(torch.randn(2, 3, 7))
