"""AdaB2N against its equations, and what it promises about ranks, resuming, checkpointing and bad input."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit.continual.adab2n import AdaB2NStrategy
from trainkit.norm_layer.adab2n import AdaB2N
from trainkit.norm_layer.batch import batch
from trainkit.norm_layer.stateful import advance
from trainkit.norm_layer.task_ids import announce

from .layers import RANKS, TASKS, WIDTH, equal, float64, images, on_ranks, perturbed, step  # noqa: F401

IDS = [0, 0, 1, 2, 0, 2, 0]
EPS = 1e-5


def built(finished: int = 2, **knobs) -> AdaB2N:
    layer = AdaB2N(WIDTH, **{"axis": 1, "tasks": TASKS, **knobs})
    perturbed(layer)
    layer.cur_tasks.fill_(finished)
    return layer


def shares(psi, ids, finished):
    """pi_t / n_t of each sample, by the text of the reference."""
    c = {t: psi[t].exp() + ids.count(t) for t in range(finished + 1)}
    return torch.stack([c[t] / sum(c.values()) / ids.count(t) for t in ids])


def formula(layer, x, s):
    """y, mean, var by plain operations, differentiable."""
    mean = (s[:, None] * x.mean((2, 3))).sum(0)
    var = (s[:, None] * (x - mean[:, None, None]).square().mean((2, 3))).sum(0)
    z = (x - mean[:, None, None]) / (var[:, None, None] + EPS).sqrt()
    return z * layer.weight[:, None, None] + layer.bias[:, None, None], mean, var


@pytest.mark.parametrize("ids", [IDS, [0, 0, 2, 2, 0, 0, 2], [2] * 7], ids=["all", "one missing", "one alone"])
@pytest.mark.parametrize("finished", [1, 2])
def test_equations_and_every_gradient(ids, finished):
    ids = [min(t, finished) for t in ids]
    layer = built(finished, regularize=True)
    twin = copy.deepcopy(layer)
    (x, gy), eta = images(len(ids)), 0.1**layer.kappa
    announce(layer, torch.tensor(ids))
    a = x.clone().requires_grad_()
    y = layer(a)
    ((y * gy).sum() + 0.7 * layer.take_penalty()).backward()

    b = x.clone().requires_grad_()
    z, mean, var = formula(twin, b, shares(twin.task_weight, ids, finished))
    running = [(1 - eta) * old + eta * new.detach() for old, new in ((0, mean), (1, var))]
    regularizer = (mean - running[0]).square().mean() + (var - running[1]).square().mean()
    ((z * gy).sum() + 0.7 * regularizer).backward()
    assert equal(y, z)
    assert equal(a.grad, b.grad)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert equal(p.grad, q.grad)
    assert not layer.task_weight.grad[finished + 1 :].any()
    assert layer.task_weight.grad[: finished + 1].all()
    assert equal(layer.running_mean, running[0])
    assert equal(layer.running_var, running[1])


def test_weights_of_a_batch_without_a_task_sum_to_less_than_one():
    layer, (x, _) = built(kappa=1.0, momentum=1.0), images(4)
    announce(layer, torch.tensor([0, 0, 2, 2]))
    layer(torch.ones_like(x))  # whose weighted mean is the sum of the weights
    c = layer.task_weight.exp() + torch.tensor([2, 0, 2])
    expected = ((c[0] + c[2]) / c.sum()).expand(WIDTH)
    assert equal(layer.running_mean, expected.detach())
    assert layer.running_mean.max() < 0.99


@pytest.mark.parametrize("how", ["task 0", "psi low", "asked for"])
def test_plain_statistics(how):
    layer, (x, gy) = built(0 if how == "task 0" else 2), images(7)
    if how == "psi low":
        layer.task_weight.data.fill_(-40)
    y, gx = step(layer, x, gy, None if how == "asked for" else IDS)
    torchs = nn.BatchNorm2d(WIDTH)
    torchs.load_state_dict({k: v for k, v in layer.state_dict().items() if k in torchs.state_dict()})
    b = x.clone().requires_grad_()
    z = torchs(b)
    z.backward(gy)
    assert equal(y, z)
    assert equal(gx, b.grad)
    if how == "task 0":
        assert not layer.task_weight.grad.any()  # zero and not missing: DistributedDataParallel needs one


def test_high_psi_balances_and_replicas_change_nothing():
    layer, (x, gy) = built(), images(7)
    layer.task_weight.data.fill_(40)
    y, _ = step(layer, x, gy, IDS)
    doubled = torch.cat([x, x[3:4], x[3:4], x[5:6], x[5:6]])
    again, _ = step(layer, doubled, torch.ones_like(doubled), [*IDS, 2, 2, 2, 2])
    assert torch.allclose(again[:7], y, rtol=1e-12, atol=1e-12)
    layer.task_weight.data.fill_(1000)  # beyond what exp can hold
    assert equal(step(layer, x, gy, IDS)[0], y)


@pytest.mark.parametrize("kappa", [0.0, 0.1, 0.7, 1.0])
def test_running_statistics_have_the_closed_form(kappa):
    layer, momentum = built(kappa=kappa), 0.1
    omega, means = (1 - momentum) ** kappa, []
    for t in range(1, 6):
        x, gy = images(7)
        mean = formula(layer, x, shares(layer.task_weight, IDS, 2))[1]
        means.append(mean.detach())
        step(layer, x, gy, IDS)
        series = t - 1 if omega == 1 else (1 - omega ** (t - 1)) / (1 - omega)
        assert equal(1 / layer.eta, torch.tensor(series + omega ** (t - 1) / momentum**kappa))
        assert int(layer.num_batches_tracked) == t
    eta = float(layer.eta)
    weighted = sum(eta * omega ** (5 - i) * mean for i, mean in enumerate(means, 1))  # of an average that begins at 0
    assert equal(layer.running_mean, weighted)
    if kappa == 0:
        assert equal(layer.running_mean, torch.stack(means).mean(0))


def test_evaluation_is_batch_norm_and_asks_for_no_tasks():
    layer = built()
    step(layer, *images(7), IDS)
    layer.eval()
    x, _ = images(5)
    expected = nn.functional.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    assert equal(layer(x), expected)
    assert equal(layer(x[:2]), expected[:2])


def test_tokens_vectors_and_images_agree():
    image, tokens = built(), built(axis=-1)
    tokens.load_state_dict(image.state_dict())
    x, gy = images(7)
    a, b = step(image, x, gy, IDS), step(tokens, x.movedim(1, -1), gy.movedim(1, -1), IDS)
    assert all(equal(p, q.movedim(-1, 1)) for p, q in zip(a, b, strict=True))
    a, b = (
        step(image, x[:, :, :1, :1], gy[:, :, :1, :1], IDS),
        step(tokens, x[:, :, 0, 0], gy[:, :, 0, 0], IDS),
    )
    assert all(equal(p[:, :, 0, 0], q) for p, q in zip(a, b, strict=True))


def test_one_position_uses_the_running_statistics_and_changes_nothing():
    layer = built(regularize=True)
    step(layer, *images(7), IDS)
    layer.take_penalty()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(1, WIDTH, 1, 1)
    y, gx = step(layer, x, torch.ones_like(x), [1])
    assert equal(y, copy.deepcopy(layer).eval()(x))
    assert equal(gx.flatten(), layer.weight / (layer.running_var + EPS).sqrt())
    assert layer.take_penalty() == 0
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_resume_continues_eta():
    unbroken, batches = built(), [images(7) for _ in range(4)]
    for x, gy in batches[:2]:
        step(unbroken, x, gy, IDS)
    resumed = AdaB2N(WIDTH, axis=1, tasks=TASKS)
    resumed.load_state_dict(unbroken.state_dict())
    for x, gy in batches[2:]:
        ys = [step(layer, x, gy, IDS)[0] for layer in (unbroken, resumed)]
        assert torch.equal(*ys)
    for a, b in zip(unbroken.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_another_number_of_tasks_is_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch for task_weight"):
        AdaB2N(WIDTH, tasks=4).load_state_dict(AdaB2N(WIDTH, tasks=5).state_dict())


def test_count_step_makes_one_update_per_step():
    layer, (x, gy) = built(count="step"), images(7)
    whole = copy.deepcopy(layer)
    for part, g, ids in zip(x.split([3, 4]), gy.split([3, 4]), (IDS[:3], IDS[3:]), strict=True):
        step(layer, part, g, [0] * len(ids))
    assert not layer.running_mean.any()
    advance(layer)
    assert int(layer.num_batches_tracked) == 1
    means = [formula(whole, p, shares(whole.task_weight, [0] * len(p), 2))[1] for p in x.split([3, 4])]
    assert equal(layer.running_mean, 0.1**0.4 * (3 * means[0] + 4 * means[1]).detach() / 7)


class Net(nn.Module):
    def __init__(self, layer: nn.Module, stored: bool):
        super().__init__()
        self.layer, self.stored = layer, stored

    def forward(self, x):
        def run(x):
            return torch.tanh(self.layer(x))

        return checkpoint(run, x, use_reentrant=False) if self.stored else run(x)


@pytest.mark.parametrize("count", ["call", "step"])
def test_activation_checkpointing_changes_nothing(count):
    """Two forwards with other tasks before one backward, with the penalty of both."""
    nets = [Net(built(count=count, regularize=True), stored) for stored in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[1].layer.cur_tasks.fill_(2)
    parts = [images(7), images(7)]
    found = []
    for net in nets:
        xs = [x.clone().requires_grad_() for x, _ in parts]
        total = torch.zeros(())
        for x, (_, gy), ids in zip(xs, parts, (IDS, IDS[::-1]), strict=True):
            announce(net, torch.tensor(ids))
            total = total + (net(x) * gy).sum()
        (total + net.layer.take_penalty()).backward()
        advance(net)
        found.append([*(x.grad for x in xs), *(p.grad for p in net.parameters()), *net.state_dict().values()])
    assert all(equal(a.double(), b.double()) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    layer = built().float().to(dtype)
    reference = copy.deepcopy(layer).double()
    x, gy = images(7)
    y, gx = step(layer, (1000 * x).to(dtype), gy.to(dtype), IDS)
    expected = step(reference, (1000 * x).to(dtype).double(), gy.to(dtype).double(), IDS)
    assert y.dtype == gx.dtype == dtype
    assert torch.allclose(y.double(), expected[0], rtol=0.03, atol=0.03)
    assert torch.allclose(gx.double(), expected[1], rtol=0.05, atol=1e-4)
    assert layer.running_var.dtype == torch.float32
    assert torch.allclose(layer.running_var.double(), reference.running_var, rtol=1e-5)


def test_autocast_does_not_lower_the_statistics():
    layer = built().float()
    twin, (x, gy) = copy.deepcopy(layer), images(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = step(layer, x.float(), gy.float(), IDS)
    assert torch.equal(y, step(twin, x.float(), gy.float(), IDS)[0])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_tasks_that_nobody_announced():
    layer, (x, _) = built(), images(7)
    with pytest.raises(ValueError, match=r"needs the task of each sample, and none was announced. Call strategy.begin"):
        layer(x)
    announce(layer.eval(), torch.tensor(IDS))  # is about evaluation
    with pytest.raises(ValueError, match="none was announced"):
        layer.train()(x)


def test_an_announcement_of_another_size():
    layer, (x, _) = built(), images(7)
    announce(layer, torch.tensor(IDS))
    with pytest.raises(ValueError, match=r"told the tasks of 7 samples and sees a batch of 4. Call strategy.begin"):
        layer(x[:4])


@pytest.mark.parametrize("ids", [[0, 3, 0, 0], [-1, 0, 0, 0]])
def test_a_task_that_does_not_exist(ids):
    layer, (x, _) = built(), images(4)
    announce(layer, torch.tensor(ids))
    with pytest.raises(ValueError, match="task ids must be from 0 to 2, as there are 3 tasks"):
        layer(x)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"tasks": 0}, "number of tasks, at least 1; got 0"),
        ({"kappa": 1.5}, "kappa is from 0 .* to 1 .*; got 1.5"),
        ({"momentum": None}, r"momentum in \(0, 1\]; got None. Set norm_layer.momentum=0.1"),
        ({"momentum": 0.0}, r"momentum in \(0, 1\]; got 0.0"),
    ],
)
def test_settings_without_sense(knobs, message):
    with pytest.raises(ValueError, match=message):
        built(**knobs)


# --- the strategy -----------------------------------------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(batch(WIDTH, axis=1), nn.Tanh(), batch(WIDTH, axis=1))


def test_penalty_sums_layers_and_forwards_from_its_task_on():
    strategy = AdaB2NStrategy(TASKS, lambda_reg=0.5, from_task=1)
    model = strategy.convert(network())
    parts = [images(7)[0], images(7)[0]]

    def penalties():
        for x in parts:
            strategy.begin_batch(model, torch.tensor(IDS))
            model(x)
        return strategy.penalty(model)

    strategy.begin_task(model, 0)
    assert penalties() == 0
    strategy.begin_task(model, 1)
    twin, alone = copy.deepcopy(model), []
    for x in parts:
        strategy.begin_batch(twin, torch.tensor(IDS))
        twin(x)
        alone.append(sum(layer.take_penalty() for layer in twin if isinstance(layer, AdaB2N)))
    assert equal(penalties(), 0.5 * sum(alone))
    assert alone[0] > 0.01
    assert strategy.penalty(model) == 0.0  # handed out once
    with torch.no_grad():
        penalties()
    assert strategy.penalty(model) == 0.0


def test_without_weight_nothing_is_noted():
    strategy = AdaB2NStrategy(TASKS, lambda_reg=0)
    model = strategy.convert(network())
    strategy.begin_batch(model, torch.tensor(IDS))
    model(images(7)[0])
    assert not any(layer._noted for layer in model if isinstance(layer, AdaB2N))


def test_tasks_are_counted():
    strategy = AdaB2NStrategy(TASKS)
    model = strategy.convert(network())
    for task in range(TASKS):
        strategy.begin_task(model, task)
        assert int(model[0].cur_tasks) == task
        strategy.end_task(model, task)
        assert int(model[2].cur_tasks) == task + 1
    with pytest.raises(ValueError, match=r"continual\.tasks=3, but the stream begins task number 4"):
        strategy.begin_task(model, TASKS)


def test_a_teacher_can_be_copied_at_any_time():
    strategy = AdaB2NStrategy(TASKS)
    model = strategy.convert(network())
    strategy.begin_task(model, 1)
    strategy.begin_batch(model, torch.tensor(IDS))
    x, _ = images(7)
    model(x)
    teacher = copy.deepcopy(model).eval()
    assert equal(teacher(x), copy.deepcopy(model).eval()(x))
    assert strategy.penalty(teacher) == 0.0
    assert strategy.penalty(model) > 0


SHARES = [3, 4]


def outcome(rank: int | None) -> dict:
    """Outputs, gradients and state after three steps; the ranks have other tasks, one of them lacks two."""
    torch.manual_seed(1)
    strategy, results = AdaB2NStrategy(TASKS, from_task=0, lambda_reg=0.5), []
    model = strategy.convert(network())
    perturbed(model)
    for t, finished in enumerate((0, 1, 2)):
        strategy.begin_task(model, finished)
        (x, gy), ids = images(7), torch.tensor(IDS if t != 1 else [0, 0, 0, 0, 1, 1, 0]).clamp(max=finished)
        if rank is not None:
            x, gy, ids = (v.split(SHARES)[rank] for v in (x, gy, ids))
        strategy.begin_batch(model, ids)
        x = x.clone().requires_grad_()
        y = model(x)
        penalty = strategy.penalty(model)
        # The ranks' losses are averaged by DistributedDataParallel, here they are added: the penalty is each one's.
        ((y * gy).sum() + (penalty if rank is None else penalty / RANKS)).backward()
        results += [y.detach(), x.grad]
    return {"rows": results, "gradients": [p.grad for p in model.parameters()], "state": dict(model.state_dict())}


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path):
    parts, whole = on_ranks(outcome, tmp_path), outcome(None)
    tolerance = {"rtol": 1e-9, "atol": 1e-12}
    for expected, *found in zip(whole["rows"], *(part["rows"] for part in parts), strict=True):
        assert torch.allclose(torch.cat(found), expected, **tolerance)
    for expected, *found in zip(whole["gradients"], *(part["gradients"] for part in parts), strict=True):
        assert torch.allclose(sum(found), expected, **tolerance)
    for part in parts:
        for name, expected in whole["state"].items():
            assert torch.allclose(part["state"][name].double(), expected.double(), **tolerance), name
