"""ER, ER-ACE and DER++ against their formulas; the two kinds of forward; their state."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from tests.menu import build
from trainkit.continual.strategy import Strategy
from trainkit.learner.derpp import DarkReplay
from trainkit.learner.er import ExperienceReplay
from trainkit.learner.er_ace import AsymmetricReplay
from trainkit.learner.joint import Joint

from .streams import TASKS, batch, begun, float64, network, refuse, step, train  # noqa: F401

LEARNERS = {"er": ExperienceReplay, "er_ace": AsymmetricReplay, "derpp": DarkReplay}
learners = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)
FEW = {"buffer_size": 6, "replay_batch": 6}  # all that is stored is drawn


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def stored(learner, task, size=6):
    """Puts a batch into the buffer, which it fills."""
    past = batch(task, size)
    logits = torch.randn(size, 6) if isinstance(learner, DarkReplay) else None
    learner.buffer.add(past.raw, past.labels, past.task_ids, logits)
    return past, logits


def test_er_is_the_mean_over_the_union():
    model, learner = network(), begun(ExperienceReplay(**FEW))
    past, _ = stored(learner, 0)
    now = batch(1)
    loss, logged = learner(model, now, refuse)
    expected = F.cross_entropy(model(torch.cat([now.x, past.x])), torch.cat([now.labels, past.labels]))
    close(loss, expected)
    close(loss, (5 * logged["current_loss"] + 6 * logged["replay_loss"]) / 11)


def ace(z, labels, highest, form, classes=6):
    """Sample by sample, class by class."""
    allowed = set(labels.tolist())
    if form == "mammoth" or highest < classes - 1:
        allowed |= set(range(highest, classes))
    columns = sorted(allowed)
    losses = [row[columns].logsumexp(0) - row[label] for row, label in zip(z, labels.tolist(), strict=True)]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("form", ["adab2n", "mammoth"])
@pytest.mark.parametrize("task", [1, 2])
def test_er_ace_masks_the_classes_of_the_past(form, task):
    model, learner = network(norm=False), begun(AsymmetricReplay(form=form, **FEW))
    past, _ = stored(learner, 0)
    learner.begin_task(model, task)
    now = batch(task)
    now = now._replace(labels=torch.full((5,), 2 * task))  # the task's other class is seen, or not yet
    learner.see(torch.tensor([0, 1, 2 * task + 1] if task == 2 else [0, 1]))
    loss, logged = learner(model, now, refuse)
    highest = 5 if task == 2 else 2
    close(logged["current_loss"], ace(model(now.x), now.labels, highest, form))
    close(loss, logged["current_loss"] + F.cross_entropy(model(past.x), past.labels))
    forms = [ace(model(now.x), now.labels, highest, f) for f in ("adab2n", "mammoth")]
    assert (forms[0] == forms[1]) == (task == 1)


def test_er_ace_gives_absent_old_classes_no_gradient_from_new_samples():
    model, learner = network(), begun(AsymmetricReplay(**FEW))
    learner.begin_task(model, 1)
    learner.see(torch.tensor([0, 1]))
    learner(model, batch(1), refuse)[0].backward()
    assert not model.head.weight.grad[:2].any()
    assert model.head.weight.grad[2:].abs().sum(1).all()


def test_er_ace_starts_with_the_second_task():
    model, learner = network(), begun(AsymmetricReplay(**FEW))
    free = begun(AsymmetricReplay(task_free=True, **FEW))
    for each in (learner, free):
        each.begin_task(model, 0)
        past, _ = stored(each, 0)
    now = batch(0, seed=1)
    close(learner(model, now, refuse)[0], F.cross_entropy(model(now.x), now.labels))
    z = model(torch.cat([now.x, past.x]))
    close(free(model, now, refuse)[0], F.cross_entropy(z[:5], now.labels) + F.cross_entropy(z[5:], past.labels))


def test_derpp_is_its_formula_and_stores_the_training_logits():
    model, learner = network(), begun(DarkReplay(alpha=0.3, beta=0.7, buffer_size=20, replay_batch=20))
    past, logits = stored(learner, 0)
    now = batch(1)
    loss, _ = learner(model, now, refuse)
    z = model(torch.cat([now.x, past.x, past.x]))
    squares = sum(float((a - b).square().sum()) for a, b in zip(z[5:11].detach(), logits, strict=True))
    expected = F.cross_entropy(z[:5], now.labels) + 0.7 * F.cross_entropy(z[11:], past.labels) + 0.3 * squares / 36
    close(loss, expected)
    newest = learner.buffer._stored["logits"][6:11]
    close(newest, z[:5].detach())
    assert not newest.requires_grad


def test_derpp_draws_twice():
    learner = begun(DarkReplay(buffer_size=40, replay_batch=5, forward="separate"))
    model, drawn = network(norm=False), []
    stored(learner, 0, 40)
    handle = model.register_forward_pre_hook(lambda _, inputs: drawn.append(inputs[0]))
    learner(model, batch(1), refuse)
    handle.remove()
    assert len(drawn) == 3
    assert not torch.equal(drawn[1], drawn[2])


def test_a_term_without_weight_is_not_drawn():
    model = network()
    for options, parts in (({"alpha": 0.0}, 2), ({"beta": 0.0}, 2), ({"alpha": 0.0, "beta": 0.0}, 1)):
        learner, sizes = begun(DarkReplay(**options, buffer_size=6, replay_batch=4)), []
        stored(learner, 0)
        handle = model.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        learner(model, batch(1), refuse)
        handle.remove()
        assert sizes == [5 + 4 * (parts - 1)]


@learners
def test_joint_and_separate_differ_through_batchnorm_alone(make):
    found = {}
    for norm in (True, False):
        for forward in ("joint", "separate"):
            model, learner = (
                network(norm=norm),
                begun(make(forward=forward, buffer_size=12, replay_batch=7), augment=True),
            )
            found[norm, forward] = train(learner, model, range(TASKS)), model.body.weight.detach()
    for a, b in zip(found[False, "joint"], found[False, "separate"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert abs(found[True, "joint"][0][-1] - found[True, "separate"][0][-1]) > 1e-4


@learners
def test_each_forward_is_announced_with_the_tasks_in_it(make):
    class Listener(Strategy):
        def begin_batch(self, model, task_ids):
            heard.append(task_ids.tolist())

    sizes = {"er": [3], "er_ace": [3], "derpp": [3, 3]}[next(k for k, v in LEARNERS.items() if v is make)]
    for forward in ("joint", "separate"):
        learner, heard = begun(make(forward=forward, buffer_size=6, replay_batch=3)), []
        learner.strategy = Listener()
        stored(learner, 0)
        learner.begin_task(network(), 1)
        learner(network(), batch(1), refuse)
        parts = [[1] * 5, *([0] * size for size in sizes)]
        assert heard == (parts if forward == "separate" else [[task for part in parts for task in part]])


@learners
@pytest.mark.parametrize("kind", ["reservoir", "ring"])
def test_a_restored_learner_goes_on_identically(make, kind):
    def fresh(seed):
        return begun(make(buffer=kind, buffer_size=12, replay_batch=7), augment=True, seed=seed)

    model, learner = network(), fresh(0)
    train(learner, model, [0, 1])
    learner.begin_task(model, 2)
    step(learner, model, torch.optim.SGD(model.parameters(), lr=0.1), batch(2, seed=9))
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other, twin = fresh(5), copy.deepcopy(model)
    other.load_state_dict(torch.load(file, weights_only=True))
    for n in range(3):
        losses = [
            step(who, net, torch.optim.SGD(net.parameters(), lr=0.1), batch(2, seed=n))
            for who, net in ((learner, model), (other, twin))
        ]
        assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@learners
def test_by_default_as_many_are_replayed_as_come_in(make):
    learner, sizes, model = begun(make()), [], network()
    stored(learner, 0, 40)
    learner.begin_task(model, 1)
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    learner(model, batch(1, 4), refuse)
    assert sizes == [12 if make is DarkReplay else 8]


@learners
def test_one_sample_and_an_empty_buffer_are_fine_without_batch_statistics(make):
    learner = begun(make())
    loss, logged = learner(network(norm=False), batch(0, 1), refuse)
    assert loss.isfinite()
    assert set(logged) == {"current_loss"}
    assert len(learner.buffer) == 1


def test_half_precision_logits_are_masked_and_stored():
    torch.set_default_dtype(torch.float32)
    for make in LEARNERS.values():
        model, learner = network().bfloat16(), begun(make(**FEW))
        for task in range(2):
            learner.begin_task(model, task)
            now = batch(task)
            loss, _ = learner(model, now._replace(x=now.x.bfloat16()), refuse)
            assert loss.dtype == torch.float32
            assert loss.isfinite()


def test_the_menu_builds_them():
    for name, make in LEARNERS.items():
        learner = build("learner", f"learner={name}", "data=split_digits", "model=mlp", "learner.forward=separate")
        assert type(learner) is make
        assert (learner.forward, learner.kind, learner.replay_batch) == ("separate", "reservoir", None)


def test_joint_is_the_tasks_own_loss_on_a_mixed_stream():
    learner, model = begun(Joint()), network()
    learner.begin_task(model, TASKS - 1)
    assert learner(model, batch(0), lambda *_: torch.tensor(3.0))[0] == 3
    with pytest.raises(ValueError, match=r"all tasks at once, .* Try data\.mixed=true, or learner=finetune"):
        learner.begin_task(model, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer": "heap"}, r"learner\.buffer must be one of reservoir, ring; got 'heap'"),
        ({"forward": "both"}, r"learner\.forward must be one of joint, separate; got 'both'"),
        ({"buffer_size": 0}, r"learner\.buffer_size must be at least 1, as this learner replays; got 0"),
        ({"replay_batch": 0}, r"learner\.replay_batch must be at least 1, or null; got 0"),
    ],
)
@learners
def test_settings_that_cannot_be(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_further_settings_that_cannot_be():
    with pytest.raises(ValueError, match=r"learner\.form must be one of adab2n, mammoth; got 'x'"):
        AsymmetricReplay(form="x")
    with pytest.raises(ValueError, match=r"learner\.alpha must not be negative; got -1"):
        DarkReplay(alpha=-1)


@learners
def test_batches_without_task_ids_are_refused(make):
    learner, now = begun(make()), batch(0)
    for bad in ((now.x, now.labels), now._replace(task_ids=None), now._replace(task_ids=now.task_ids[:2])):
        with pytest.raises(ValueError, match=r"batches with a task id for each sample .* Try data=split_digits"):
            learner(network(), bad, refuse)
