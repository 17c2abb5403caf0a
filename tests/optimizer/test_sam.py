"""SAM and ASAM against the formula, around every base, and the base left in charge of everything else."""

import re
from copy import deepcopy
from functools import partial
from itertools import product

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from tests.menu import build, options
from trainkit.launch.check.composition import Composition
from trainkit.launch.check.words import parse
from trainkit.launch.compose import compose
from trainkit.launch.menu import menu
from trainkit.launch.sources import CONF, Folders
from trainkit.optimizer.partition import by_role, split
from trainkit.optimizer.sam import SAM

WRAPPERS = {"sam", "asam"}
REST = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "momentum": 0.9}
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


class Model(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.hidden = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))
        self.head = nn.Linear(8, 11)
        self.head.role = "head"
        self.to(dtype)

    def loss(self, seed):
        tokens = torch.randint(11, (2, 16), generator=torch.Generator().manual_seed(seed))
        x = self.norm(self.embed(tokens[0]))
        for layer in self.hidden:
            x = x + layer(x).tanh()
        return nn.functional.cross_entropy(self.head(x).float(), tokens[1])


def closure(model, optimizer, seed, seen=None):
    """Notes the weights of every pass in `seen`."""

    def compute():
        optimizer.zero_grad()
        loss = model.loss(seed)
        loss.backward()
        if seen is not None:
            seen.append(flat(model))
        return loss

    return compute


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def steps(model, optimizer, count=3, first=0):
    for seed in range(first, first + count):
        optimizer.step(closure(model, optimizer, seed))
    return flat(model)


@pytest.mark.parametrize("adaptive", [False, True])
def test_formula(adaptive):
    model, by_hand, rho = Model(), Model(), 0.3
    optimizer, plain = SAM(model.parameters(), SGD, rho=rho, adaptive=adaptive), SGD(by_hand.parameters())
    for seed in range(3):
        parameters = list(by_hand.parameters())
        start = [p.detach().clone() for p in parameters]
        gradients = torch.autograd.grad(by_hand.loss(seed), parameters)
        weights = [w.abs() if adaptive else torch.ones_like(w) for w in start]
        norm = sum(((w * g) ** 2).sum() for w, g in zip(weights, gradients, strict=True)) ** 0.5
        with torch.no_grad():
            for p, w, g in zip(parameters, weights, gradients, strict=True):
                p.add_(rho / (norm + 1e-12) * w**2 * g)
        perturbed = flat(by_hand)
        second = torch.autograd.grad(by_hand.loss(seed), parameters)
        with torch.no_grad():
            for p, before, g in zip(parameters, start, second, strict=True):
                p.copy_(before)
                p.grad = g
        plain.step()

        seen = []
        optimizer.step(closure(model, optimizer, seed, seen))
        torch.testing.assert_close(seen[1], perturbed, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(flat(model), flat(by_hand), rtol=1e-12, atol=1e-15)


def test_the_perturbation_has_length_rho_whatever_the_loss_is_scaled_by():
    ends = []
    for scale in (1.0, 1e3):
        model, seen = Model(), []
        optimizer = SAM(model.parameters(), SGD, rho=0.05)

        def compute(model=model, optimizer=optimizer, scale=scale, seen=seen):
            optimizer.zero_grad()
            (scale * model.loss(0)).backward()
            seen.append(flat(model))

        optimizer.step(compute)
        assert (seen[1] - seen[0]).norm().item() == pytest.approx(0.05, rel=1e-9)
        ends.append(seen[1])
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_large_and_odd_tensors_are_perturbed_as_one_vector():
    """Cut into blocks, not contiguous, and one without a gradient."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((300, 400), (7,), (3,))]
    params.append(nn.Parameter(torch.randn(40, 50).T))
    gradients = [torch.randn_like(p) for p in params]
    start, seen = [p.detach().clone() for p in params], []
    optimizer = SAM(params, partial(torch.optim.SGD, lr=0.0), rho=2.0)

    def compute():
        seen.append([p.detach().clone() for p in params])
        for i, (p, g) in enumerate(zip(params, gradients, strict=True)):
            p.grad = None if i == 2 else g.clone()

    optimizer.step(compute)
    norm = sum(g.double().square().sum() for i, g in enumerate(gradients) if i != 2).sqrt()
    for i, (before, after, g) in enumerate(zip(start, seen[1], gradients, strict=True)):
        expected = before if i == 2 else before + (2.0 / norm).float() * g
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-7)
    assert all(torch.equal(p, before) for p, before in zip(params, start, strict=True))


def test_rho_zero_is_the_base():
    model, other = Model(), Model()
    assert torch.equal(steps(model, SAM(model.parameters(), SGD, rho=0.0)), steps(other, SGD(other.parameters())))


def test_the_loss_is_that_of_the_first_pass():
    model = Model()
    expected = model.loss(0).item()
    optimizer = SAM(model.parameters(), SGD, rho=0.5)
    assert optimizer.step(closure(model, optimizer, 0)).item() == expected


def test_a_second_pass_that_fails_leaves_the_weights_as_they_were():
    model = Model(torch.float32)
    optimizer, start, passes = SAM(model.parameters(), SGD, rho=0.5), flat(model), []

    def compute():
        passes.append(flat(model))
        if len(passes) == 2:
            raise KeyboardInterrupt
        model.loss(0).backward()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(compute)
    assert not torch.equal(passes[1], start)
    assert torch.equal(flat(model), start)


def test_what_makes_the_second_gradient_may_be_another_function():
    model, calls = Model(), []
    optimizer = SAM(model.parameters(), SGD, rho=0.5)
    optimizer.again = lambda: calls.append(flat(model))
    seen = []
    optimizer.step(closure(model, optimizer, 0, seen))
    assert len(seen) == len(calls) == 1
    assert not torch.equal(seen[0], calls[0])


def test_without_a_closure_it_says_what_to_do():
    with pytest.raises(ValueError, match=r"needs a closure: optimizer\.step\(closure\)"):
        SAM(Model().parameters(), SGD).step()


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_rho_that_is_no_length_is_refused(rho):
    with pytest.raises(ValueError, match=r"optimizer\.rho must not be negative"):
        SAM(Model().parameters(), SGD, rho=rho)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(embedding.parameters(), partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"Try nn\.Embedding\(sparse=False\)"):
        optimizer.step(lambda: embedding(torch.tensor([1])).sum().backward())


@pytest.mark.parametrize(("value", "adaptive"), [*product([0.0, float("nan"), float("inf")], [False, True])])
def test_zero_gradients_move_nothing_and_others_propagate(value, adaptive):
    p, seen = nn.Parameter(torch.ones(3)), []
    optimizer = SAM([p], partial(torch.optim.SGD, lr=1.0), rho=0.1, adaptive=adaptive)

    def compute():
        seen.append(p.detach().clone())
        p.grad = torch.full((3,), value)

    optimizer.step(compute)
    assert torch.equal(seen[1], torch.ones(3)) if value == 0 else seen[1].isnan().all()
    assert torch.equal(p, torch.ones(3)) if value == 0 else not p.isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_perturbed_in_float32(dtype):
    p, seen = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype)), []
    optimizer = SAM([p], partial(torch.optim.SGD, lr=0.0), rho=1.0)

    def compute():
        seen.append(p.detach().clone())
        p.grad = torch.tensor([300.0, 400.0], dtype=dtype)  # squares beyond float16

    optimizer.step(compute)
    assert seen[1].tolist() == pytest.approx([1.6, -1.2], rel=1e-2)
    assert torch.equal(p, seen[0])


# --- the base ----------------------------------------------------------------------------------------------------


def base_of(name, **changed):
    """conf/optimizer/<name>.yaml as it stands below optimizer.base, so that ${…} in it must be relative."""
    chosen = OmegaConf.to_container(compose(["optimizer=sam", f"optimizer/base={name}"]).optimizer.base)
    node = OmegaConf.merge(chosen, changed)
    return instantiate(OmegaConf.create({"optimizer": {"base": node}}))["optimizer"]["base"]


def test_every_optimizer_can_be_the_base():
    assert set(options("optimizer/base")) == set(options("optimizer")) - WRAPPERS
    for name in options("optimizer/base"):
        file = OmegaConf.load(CONF / "optimizer" / "base" / f"{name}.yaml")
        assert file == {"defaults": [f"/optimizer/{name}@_here_"]}


@pytest.mark.parametrize("name", sorted(set(options("optimizer")) - WRAPPERS))
def test_around_each_base(name):
    """With rho=0 it is that optimizer, groups by role and all; with rho it is not; its state is the base's alone."""
    base, model, other, third = base_of(name), Model(torch.float32), Model(torch.float32), Model(torch.float32)
    factory, words = split(base)
    alone = by_role(other, factory, **words)
    wrapped = by_role(model, partial(SAM, base=base, rho=0.0))
    assert torch.equal(steps(model, wrapped), steps(other, alone))
    assert [g["role"] for g in wrapped.param_groups] == [g["role"] for g in alone.param_groups]
    assert str(wrapped.state_dict()) == str(alone.state_dict())
    assert not torch.equal(steps(third, by_role(third, partial(SAM, base=base, rho=0.5))), flat(other))


@pytest.mark.parametrize("base", ["adamw", "lion"])
def test_a_saved_state_gives_the_same_next_steps(base):
    factory = partial(SAM, base=base_of(base, takes=["matrix"], rest=REST), rho=0.1)
    model = Model()
    optimizer = by_role(model, factory)
    steps(model, optimizer)
    again = Model()
    again.load_state_dict(model.state_dict())
    resumed = by_role(again, factory)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))  # torch shares its tensors
    assert torch.equal(steps(again, resumed, first=3), steps(model, optimizer, first=3))
    assert resumed.param_groups is resumed.base.param_groups
    assert resumed.state is resumed.base.state


def test_schedules_reach_the_base():
    model = Model()
    optimizer = by_role(model, partial(SAM, base=base_of("adamw", takes=["matrix"], rest=REST), rho=0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    optimizer.step(closure(model, optimizer, 0))
    schedule.step()
    before = flat(model)
    optimizer.step(closure(model, optimizer, 1))
    assert torch.equal(flat(model), before)


def test_as_chosen_on_the_command_line():
    factory, words = split(build("optimizer", "optimizer=asam", "optimizer/base=sgd", "optimizer.base.lr=0.25"))
    optimizer = by_role(Model(), factory, **words)
    assert isinstance(optimizer, SAM)
    assert isinstance(optimizer.base, torch.optim.SGD)
    assert (optimizer.rho, optimizer.adaptive) == (2.0, True)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


# --- the group within the group ----------------------------------------------------------------------------------


def test_keys_are_blamed_on_the_file_that_sets_them():
    words = ["optimizer=sam", "optimizer/base=muon"]
    job = Composition(compose(words), Folders(), parse(words, Folders()))
    assert re.fullmatch(r" \(conf/optimizer/muon\.yaml:\d+\)", job.where("optimizer.base.steps"))
    assert re.fullmatch(r" \(conf/optimizer/rest/of_muon\.yaml:\d+\)", job.where("optimizer.base.rest.lr"))
    assert job.where("optimizer.base.fused") == ""  # adamw is not what was chosen
    assert re.fullmatch(r" \(conf/optimizer/sam\.yaml:\d+\)", job.where("optimizer.rho"))


def test_what_a_model_or_norm_prefers_of_an_optimizer_holds_for_the_base():
    alone, wrapped = compose(["norm=ngpt"]).optimizer, compose(["norm=ngpt", "optimizer=sam"]).optimizer.base
    assert wrapped == alone
    assert wrapped.weight_decay == 0
    other = compose(["optimizer=sam", "optimizer/base=sgd"]).optimizer.base
    assert other.lr == OmegaConf.load(CONF / "optimizer" / "sgd.yaml").lr


def test_help_names_the_bases_once():
    section = menu().split("\noptimizer=\n")[1].split("\n\n")[0]
    assert "with optimizer=asam or optimizer=sam:" in section
    assert "with any but optimizer=asam or optimizer=sam:" in section
    names = section.split("optimizer/base=")[1].split("with")[0].split()
    assert names == options("optimizer/base")
    assert "ASAM, SAM relative" in section
