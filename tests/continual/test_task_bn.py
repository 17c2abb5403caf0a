"""Task-specific batch norm: each sample's own set, and what happens where tasks are not told."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit.continual.task_bn import TaskBatchNormStrategy
from trainkit.norm_layer.batch import batch
from trainkit.norm_layer.stateful import advance
from trainkit.norm_layer.task_batch import TaskBatchNorm
from trainkit.norm_layer.task_ids import announce
from trainkit.optimizer.partition import roles

from .layers import TASKS, WIDTH, equal, float64, images, on_ranks, perturbed, step  # noqa: F401

IDS = [0, 2, 0, 1, 2, 0, 2]
STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def built(**knobs) -> TaskBatchNorm:
    return perturbed(TaskBatchNorm(WIDTH, **{"axis": 1, "tasks": TASKS, **knobs}))


def apart(layer: TaskBatchNorm) -> list[nn.BatchNorm2d]:
    """A BatchNorm of torch for each task, with its set."""
    found = [nn.BatchNorm2d(WIDTH, momentum=layer.momentum) for _ in range(TASKS)]
    for task, bn in enumerate(found):
        bn.load_state_dict({name: layer.state_dict()[name][task] for name in STATE})
    return found


@pytest.mark.parametrize("momentum", [0.1, None])
def test_each_task_has_a_batch_norm_of_its_own(momentum):
    layer = built(momentum=momentum)
    torchs = apart(layer)
    for ids in (IDS, [0, 0, 0, 0, 2, 2, 2], IDS):
        x, gy = images(7)
        layer.zero_grad()
        y, gx = step(layer, x, gy, ids)
        for task, bn in enumerate(torchs):
            own = torch.tensor(ids) == task
            bn.zero_grad(set_to_none=False)
            if own.any():
                b = x[own].requires_grad_()
                z = bn(b)
                z.backward(gy[own])
                assert equal(y[own], z)
                assert equal(gx[own], b.grad)
            for name in STATE:
                assert equal(getattr(layer, name)[task].double(), getattr(bn, name).double())
            if bn.weight.grad is not None:
                assert equal(layer.weight.grad[task], bn.weight.grad)
                assert equal(layer.bias.grad[task], bn.bias.grad)
    x, _ = images(4)
    announce(layer.eval(), torch.tensor([2, 0, 1, 2]))
    assert equal(layer(x), torch.stack([torchs[t].eval()(x[i : i + 1])[0] for i, t in enumerate([2, 0, 1, 2])]))


def test_nan_stays_in_its_task():
    layer, (x, gy) = built(), images(7)
    x[3] = float("nan")  # the one sample of task 1
    y, gx = step(layer, x, gy, IDS)
    others = torch.tensor(IDS) != 1
    assert y[3].isnan().all()
    assert y[others].isfinite().all()
    assert gx[others].isfinite().all()
    assert layer.running_mean.isfinite().all(1).tolist() == [True, False, True]


def test_a_task_with_one_position_uses_its_running_statistics_and_they_stay():
    layer = built()
    step(layer, *images(7), IDS)
    before, x = copy.deepcopy(layer), torch.randn(5, WIDTH, 1, 1)
    y, _ = step(layer, x, torch.ones_like(x), [0, 0, 0, 1, 0])
    announce(before.eval(), torch.tensor([1]))
    assert equal(y[3:4], before(x[3:4]))
    assert torch.equal(layer.running_mean[1:], before.running_mean[1:])
    assert layer.num_batches_tracked.tolist() == [2, 1, 1]
    assert not torch.equal(layer.running_mean[0], before.running_mean[0])


def test_a_step_of_two_forwards_is_one_update_by_all_samples():
    parts, whole = built(count="step"), built()
    x, gy = images(7)
    for piece, g, ids in zip(x.split([3, 4]), gy.split([3, 4]), (IDS[:3], IDS[3:]), strict=True):
        step(parts, piece, g, ids)
    advance(parts)
    step(whole, x, gy, IDS)
    assert equal(parts.running_mean, whole.running_mean)
    assert parts.num_batches_tracked.tolist() == [1, 1, 1]
    advance(parts)
    assert parts.num_batches_tracked.tolist() == [1, 1, 1]


def test_activation_checkpointing_changes_nothing():
    plain = built(count="call")
    stored, parts, found = copy.deepcopy(plain), [images(7), images(7)], []
    for layer in (plain, stored):
        xs, total = [x.clone().requires_grad_() for x, _ in parts], 0.0
        for x, (_, gy), ids in zip(xs, parts, (IDS, IDS[::-1]), strict=True):
            announce(layer, torch.tensor(ids))
            y = layer(x) if layer is plain else checkpoint(layer, x, use_reentrant=False)
            total = total + (y * gy).sum()
        total.backward()
        found.append([*(x.grad for x in xs), *(p.grad for p in layer.parameters()), *layer.state_dict().values()])
    assert all(equal(a.double(), b.double()) for a, b in zip(*found, strict=True))


def test_optimizers_take_a_set_for_vectors():
    assert list(roles(nn.Sequential(built()))) == ["vector"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer = built().float().to(dtype)
    reference, (x, gy) = copy.deepcopy(layer).double(), images(7)
    y, gx = step(layer, (1000 * x).to(dtype), gy.to(dtype), IDS)
    expected = step(reference, (1000 * x).to(dtype).double(), gy.to(dtype).double(), IDS)
    assert y.dtype == gx.dtype == dtype
    assert torch.allclose(y.double(), expected[0], rtol=0.03, atol=0.03)
    assert torch.allclose(layer.running_var.double(), reference.running_var, rtol=1e-5)
    announce(layer.eval(), torch.tensor(IDS))
    assert layer((1000 * x).to(dtype)).isfinite().all()


# --- tasks that are not told ------------------------------------------------------------------------------------------


def test_training_needs_them():
    layer, (x, _) = built(), images(7)
    with pytest.raises(ValueError, match="TaskBatchNorm needs the task of each sample, and none was announced"):
        layer(x)
    announce(layer, torch.tensor(IDS))
    with pytest.raises(ValueError, match="told the tasks of 7 samples and sees a batch of 4"):
        layer(x[:4])
    announce(layer.eval(), torch.tensor(IDS))
    with pytest.raises(ValueError, match="told the tasks of 7 samples and evaluates a batch of 4"):
        layer(x[:4])


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_scenarios(scenario):
    strategy = TaskBatchNormStrategy(TASKS, scenario=scenario)
    model = strategy.convert(nn.Sequential(batch(WIDTH, axis=1)))
    perturbed(model)
    for task in range(2):
        strategy.begin_task(model, task)
        strategy.begin_batch(model, torch.full((7,), task))
        model(images(7)[0])
        strategy.end_task(model, task)
    x, _ = images(2)
    torchs = apart(model[0])
    model.eval()
    untold = model(x)  # nothing is known: what training was told does not count
    strategy.begin_batch(model, torch.tensor([0, 1]))
    newest = torchs[1].eval()(x)
    own = torch.cat([torchs[0].eval()(x[:1]), newest[1:]])
    assert equal(untold, newest)
    assert equal(model(x), own if scenario == "task" else newest)
    assert not torch.allclose(own, newest)


def test_a_teacher_uses_the_set_it_was_copied_with():
    strategy = TaskBatchNormStrategy(TASKS)
    model = strategy.convert(nn.Sequential(batch(WIDTH, axis=1)))
    strategy.begin_batch(model, torch.tensor(IDS))
    x, _ = images(7)
    model(x)
    teacher = copy.deepcopy(model).eval()
    strategy.begin_task(model, 1)
    strategy.begin_batch(model, torch.ones(7, dtype=torch.long))
    model(x)
    assert equal(teacher(x[:3]), apart(teacher[0])[0].eval()(x[:3]))


def test_what_makes_no_sense():
    with pytest.raises(ValueError, match=r"continual\.scenario must be one of class, task, domain; got 'tasks'"):
        TaskBatchNormStrategy(TASKS, scenario="tasks")
    with pytest.raises(ValueError, match="number of tasks, at least 1; got 0"):
        built(tasks=0)
    strategy = TaskBatchNormStrategy(TASKS)
    with pytest.raises(ValueError, match=r"continual\.tasks=3, but the stream begins task number 4"):
        strategy.begin_task(nn.Sequential(built()), 3)


SHARES = [3, 4]


def outcome(rank: int | None) -> dict:
    torch.manual_seed(1)
    layer, results = built(sync="none" if rank is None else "mean"), []
    for ids in (IDS, [0, 0, 0, 2, 2, 0, 2]):
        parts = (*images(7), torch.tensor(ids))
        results += step(layer, *(v if rank is None else v.split(SHARES)[rank] for v in parts))
    gradients = [p.grad for p in layer.parameters()]
    return {"rows": results, "gradients": gradients, "state": list(layer.state_dict().values())}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    parts, whole = on_ranks(outcome, tmp_path), outcome(None)
    for expected, *found in zip(whole["rows"], *(part["rows"] for part in parts), strict=True):
        assert equal(torch.cat(found), expected)
    for expected, *found in zip(whole["gradients"], *(part["gradients"] for part in parts), strict=True):
        assert equal(sum(found), expected)
    for part in parts:
        assert all(equal(a.double(), b.double()) for a, b in zip(part["state"], whole["state"], strict=True))
