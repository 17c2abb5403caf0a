"""EWC, L2, LwF, distillation of predictions and features, and their sums, against independent formulas."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.menu import build
from trainkit.continual.strategy import Strategy
from trainkit.learner.ewc import ElasticWeightConsolidation
from trainkit.learner.feat_kd import FeatureDistillation
from trainkit.learner.l2 import L2
from trainkit.learner.lwf import LearningWithoutForgetting
from trainkit.learner.pred_kd import PredictionDistillation
from trainkit.learner.rehearsal_free import TERMS, RehearsalFree

from .streams import Network, batch, begun, float64, network, refuse, step, train  # noqa: F401

ALL = {name: {"weight": 0.5} for name in TERMS}


def everything() -> RehearsalFree:
    return RehearsalFree(**ALL)


LEARNERS = {**TERMS, "rehearsal_free": everything}
learners = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def after_one_task(learner, norm=True):
    """The learner in its second task, the network a step into it, and the network as it was."""
    model = network(norm=norm)
    train(learner, model, [0])
    old = copy.deepcopy(model).eval()
    learner.begin_task(model, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, old


def cross_entropy(z, labels, columns):
    return F.cross_entropy(z[:, columns], torch.tensor([columns.index(c) for c in labels.tolist()]))


@learners
def test_the_first_task_is_plain_training(make):
    learner, model, now = begun(make()), network(), batch(0)
    learner.begin_task(model, 0)
    loss, logged = learner(model, now, refuse)
    columns = {"all": list(range(6))}.get(learner.classes, [0, 1])
    close(loss, cross_entropy(model(now.x), now.labels, columns))
    assert set(logged) == {"cross_entropy"}


@pytest.mark.parametrize(("classes", "columns"), [("all", range(6)), ("seen", range(4)), ("new", [2, 3])])
def test_which_classes_compete(classes, columns):
    learner = begun(L2(weight=0.0, classes=classes))
    model, _ = after_one_task(learner)
    now = batch(1)
    close(learner(model, now, refuse)[0], cross_entropy(model(now.x), now.labels, list(columns)))


def test_in_a_mixed_stream_all_classes_are_new():
    learner, model, now = begun(L2(classes="new")), network(), batch(0)
    learner.begin_task(model, 2)
    close(learner(model, now, refuse)[0], F.cross_entropy(model(now.x), now.labels))


def per_sample(model, batches, fisher, columns=range(6)):
    """The mean of w g², each g by a backward of its own, in eval mode."""
    model = copy.deepcopy(model).eval()
    sums, count = {name: torch.zeros_like(p) for name, p in model.named_parameters()}, 0
    for now in batches:
        for x, label in zip(now.x, now.labels.tolist(), strict=True):
            model.zero_grad()
            p = model(x[None])[0, list(columns)].softmax(0)[list(columns).index(label)]
            p.log().backward()
            for name, parameter in model.named_parameters():
                sums[name] += (p.detach() if fisher == "weighted" else 1.0) * parameter.grad**2
            count += 1
    return {name: total / count for name, total in sums.items()}


@pytest.mark.parametrize("fisher", ["weighted", "empirical"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
@pytest.mark.parametrize(("classes", "columns"), [("all", range(6)), ("new", [0, 1])])
def test_the_fisher_is_that_of_each_sample_in_eval_mode(fisher, chunk, classes, columns):
    learner, model = begun(ElasticWeightConsolidation(fisher=fisher, chunk=chunk, classes=classes)), network()
    learner.begin_task(model, 0)
    model(batch(0).x)  # running statistics that are not the initial ones
    before = copy.deepcopy(model.state_dict())
    learner.end_task(model, 0, [batch(0, seed=n) for n in range(2)])
    expected = per_sample(model, [batch(0, seed=n) for n in range(2)], fisher, columns)
    for name, value in expected.items():
        close(learner.importance[name], value)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_ewc_over_two_tasks():
    learner = begun(ElasticWeightConsolidation(weight=3.0, gamma=0.7))
    model = network()
    train(learner, model, [0])
    first = {name: value.clone() for name, value in learner.importance.items()}
    train(learner, model, [1])
    second = per_sample(model, [batch(1, seed=n) for n in range(2)], "weighted")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner.begin_task(model, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    now = batch(2)
    loss, logged = learner(model, now, refuse)
    distance = sum(
        ((0.7 * first[name] + second[name]) * (p - start[name]) ** 2).sum() for name, p in model.named_parameters()
    )
    close(logged["ewc"], 3 * distance)
    close(loss, F.cross_entropy(model(now.x), now.labels) + 3 * distance)
    (gradient,) = torch.autograd.grad(logged["ewc"], model.head.weight)
    name = "head.weight"
    close(gradient, 2 * 3 * (0.7 * first[name] + second[name]) * (model.head.weight - start[name]))


class Stubborn(torch.autograd.Function):
    """Not written for vmap."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_network_that_cannot_be_vectorized_is_taken_sample_by_sample():
    class Net(Network):
        def forward(self, x):
            return super().forward(Stubborn.apply(x))

    torch.manual_seed(0)
    model, learner = Net(), begun(ElasticWeightConsolidation())
    with pytest.warns(UserWarning, match="ewc takes one sample at a time"):
        learner.end_task(model, 0, [batch(0)])
    for name, value in per_sample(model, [batch(0)], "weighted").items():
        close(learner.importance[name], value)


def test_l2_and_which_parameters_it_holds():
    for only, names in ((None, ("body", "norm", "head")), ("body|head", ("body", "head"))):
        learner = begun(L2(weight=0.3, only=only))
        model, old = after_one_task(learner)
        loss, logged = learner(model, batch(1), refuse)
        before = dict(old.named_parameters())
        moved = [p - before[n] for n, p in model.named_parameters() if n.startswith(names)]
        close(logged["l2"], 0.3 * sum((d**2).sum() for d in moved))
        close(loss, logged["cross_entropy"] + logged["l2"])
    with pytest.raises(
        ValueError, match=r"learner\.only='attn' matches no parameter of the model; names are like body"
    ):
        begun(L2(only="attn")).end_task(network(), 0, [])


def test_lwf():
    learner = begun(LearningWithoutForgetting(weight=0.6, temperature=3.0))
    model, old = after_one_task(learner)
    now = batch(1)
    loss, _ = learner(model, now, refuse)
    z = model(now.x)
    q, taught = (v[:, :2].softmax(1) ** (1 / 3) for v in (z, old(now.x)))
    q, taught = q / q.sum(1, keepdim=True), taught / taught.sum(1, keepdim=True)
    close(loss, cross_entropy(z, now.labels, [0, 1, 2, 3]) - 0.6 * (taught * q.log()).sum(1).mean())


def test_prediction_distillation():
    now = batch(1)
    for form in ("kl", "bce"):
        learner = begun(PredictionDistillation(weight=0.6, form=form, temperature=3.0))
        model, old = after_one_task(learner)
        loss, _ = learner(model, now, refuse)
        z = model(now.x)
        new, taught = z[:, :2], old(now.x)[:, :2]
        if form == "kl":
            p, t = (new / 3).softmax(1), (taught / 3).softmax(1)
            distance = 9 * (t * (t / p).log()).sum() / 5
        else:
            p, t = 1 / (1 + (-new).exp()), 1 / (1 + (-taught).exp())
            distance = -(t * p.log() + (1 - t) * (1 - p).log()).sum() / 5
        close(loss, cross_entropy(z, now.labels, [2, 3]) + 0.6 * distance)


def test_feature_distillation():
    learner = begun(FeatureDistillation(weight=0.6))
    model, old = after_one_task(learner)
    now = batch(1)
    tracked = model.norm.num_batches_tracked.item()
    loss, _ = learner(model, now, refuse)
    assert model.norm.num_batches_tracked == tracked + 1  # one forward, of which the features are a part
    distance = (model.features(now.x) - old.features(now.x)).square().sum() / 5
    close(loss, cross_entropy(model(now.x), now.labels, [2, 3]) + 0.6 * distance)
    assert not model.head._forward_pre_hooks


def test_features_need_a_head():
    learner = begun(FeatureDistillation())
    with pytest.raises(ValueError, match=r'Sequential has 0 layers of the role "head", .* Or try learner=pred_kd'):
        learner(nn.Sequential(nn.Flatten(), nn.Linear(9, 6)), batch(0), refuse)


def test_a_sum_is_the_sum_of_its_terms():
    now = batch(1)
    together = begun(RehearsalFree(classes="all", **ALL))
    model = network(norm=False)
    together.begin_task(model, 0)
    alone = {name: begun(make(weight=0.5, classes="all")) for name, make in TERMS.items()}
    for learner in (together, *alone.values()):
        learner.end_task(model, 0, [batch(0)])
        learner.begin_task(model, 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    loss, logged = together(model, now, refuse)
    expected = {name: learner(model, now, refuse)[1][name] for name, learner in alone.items()}
    assert set(logged) == {"cross_entropy", *TERMS}
    for name, value in expected.items():
        close(logged[name], value)
        assert value > 0
    close(loss, F.cross_entropy(model(now.x), now.labels) + sum(expected.values()))


def test_a_sum_asks_the_old_network_once_and_only_if_it_must():
    calls = []
    for options, teachers in ((ALL, 1), ({"pred_kd": {"weight": 0.0}, "l2": {"weight": 1.0}}, 0)):
        learner = begun(RehearsalFree(**options))
        model, _ = after_one_task(learner)
        handle = nn.modules.module.register_module_forward_pre_hook(lambda m, _: calls.append(type(m)))
        learner(model, batch(1), refuse)
        handle.remove()
        assert calls.count(Network) == 1 + teachers
        calls.clear()
        assert (learner.state_dict()["teacher"] is None) == (not teachers)


@pytest.mark.parametrize("name", ["pred_kd", "feat_kd", "lwf"])
def test_the_old_network_is_frozen(name):
    learner = begun(TERMS[name]())
    model, old = after_one_task(learner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for n in range(3):
        step(learner, model, optimizer, batch(1, seed=n))
    teacher = learner.teacher.of(model)
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    for name, value in old.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value), name
    assert not torch.equal(model.body.weight, old.body.weight)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_a_layer_that_holds_a_piece_of_the_last_graph_can_be_copied():
    learner, model = begun(PredictionDistillation()), network()
    model.held = model.body.weight.square().sum()
    model.more = [model.body.weight.square().sum()]
    learner.end_task(model, 0, [])
    close(learner.teacher.of(model)(batch(0).x), copy_of(model)(batch(0).x))
    assert model.held.requires_grad


def copy_of(model):
    twin = network().eval()
    twin.load_state_dict(model.state_dict())
    return twin


@learners
def test_a_restored_learner_goes_on_identically(make):
    model, learner = network(), begun(make())
    train(learner, model, [0])
    learner.begin_task(model, 1)
    step(learner, model, torch.optim.SGD(model.parameters(), lr=0.1), batch(1, seed=9))
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    other, twin = begun(make()), copy.deepcopy(model)
    other.load_state_dict(torch.load(file, weights_only=True))
    for who, net in ((learner, model), (other, twin)):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for n in range(2):
            step(who, net, optimizer, batch(1, seed=n))
        who.end_task(net, 1, [batch(1)])
        who.begin_task(net, 2)
        step(who, net, optimizer, batch(2))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@learners
def test_the_training_forward_is_announced_and_the_old_networks_is_not(make):
    heard = []

    class Listener(Strategy):
        def begin_batch(self, model, task_ids):
            heard.append((model.training, task_ids.tolist()))

    learner = begun(make())
    model, _ = after_one_task(learner)
    learner.strategy = Listener()
    learner(model, batch(1), refuse)
    assert heard == [(True, [1] * 5)]


def test_the_menu_builds_them():
    for name, make in TERMS.items():
        assert type(build("learner", f"learner={name}", "data=split_digits", "model=mlp")) is make
    built = build("learner", "learner=rehearsal_free", "data=split_digits", "model=mlp", "learner.ewc.weight=2")
    assert set(built.terms) == {"pred_kd", "ewc", "l2"}
    assert built.terms["ewc"].weight == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L2(weight=-1.0), r"learner\.weight must not be negative; got -1"),
        (lambda: L2(classes="old"), r"learner\.classes must be one of all, seen, new; got 'old'"),
        (lambda: ElasticWeightConsolidation(fisher="exact"), r"learner\.fisher must be one of weighted, empirical"),
        (lambda: ElasticWeightConsolidation(gamma=1.5), r"learner\.gamma must be between 0 and 1; got 1\.5"),
        (lambda: ElasticWeightConsolidation(chunk=0), r"learner\.chunk must be at least 1; got 0"),
        (lambda: LearningWithoutForgetting(temperature=0.0), r"learner\.temperature must be above 0; got 0"),
        (lambda: PredictionDistillation(form="mse"), r"learner\.form must be one of kl, bce; got 'mse'"),
        (lambda: PredictionDistillation(temperature=-1.0), r"learner\.temperature must be above 0; got -1"),
        (lambda: RehearsalFree(l2={"weight": 0.0}), r"learner=rehearsal_free has no term: set the weight of one of"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_cannot_go_on_is_refused():
    state = RehearsalFree(l2={"weight": 1.0}).state_dict()
    with pytest.raises(ValueError, match=r"the checkpoint's terms are l2, this run's are pred_kd"):
        RehearsalFree(pred_kd={"weight": 1.0}).load_state_dict(state)
    with pytest.raises(ValueError, match=r"needs the finished task's samples for its Fisher; the loader gave none"):
        begun(ElasticWeightConsolidation()).end_task(network(), 0, [])
    with pytest.raises(ValueError, match=r"batches with a task id for each sample"):
        begun(L2())(network(), (batch(0).x, batch(0).labels), refuse)
