"""Roles are total, and a Partition is one optimizer to everybody who looks at it."""

import re
from copy import deepcopy
from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.optim import SGD, AdamW

from tests.menu import build, options
from trainkit.launch.check.composition import Composition
from trainkit.launch.check.words import parse
from trainkit.launch.compose import compose
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import check
from trainkit.launch.sources import CONF, Folders
from trainkit.optimizer.partition import WORDS, Partition, by_role, roles, split


def network() -> nn.Module:
    torch.manual_seed(0)
    return build("model", "model=gpt", "model.depth=2", "model.width=16", "model.heads=2", "model.context=8").double()


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    optimizer.step()


def mixed(net: nn.Module) -> Partition:
    made = by_role(net, partial(SGD, lr=0.1, momentum=0.9), takes=["matrix"], rest=partial(AdamW, lr=1e-2))
    assert isinstance(made, Partition)
    return made


def test_every_parameter_has_exactly_one_role():
    net = network()
    found = [p for ps in roles(net).values() for p in ps]
    assert len(found) == len(set(found)) == len(list(net.parameters()))
    assert {"matrix", "vector", "embed"} == set(roles(net))


def test_a_tied_head_is_an_embedding_and_an_untied_one_a_head():
    assert "head" not in roles(build("model", "model=gpt"))
    untied = build("model", "model=gpt", "model.tie=false")
    assert roles(untied)["head"] == [untied.head.weight]


def test_decay_falls_on_the_named_roles_only():
    optimizer = by_role(network(), partial(AdamW, lr=1e-3, weight_decay=0.1))
    assert {g["role"]: g["weight_decay"] for g in optimizer.param_groups} == {"embed": 0.1, "vector": 0, "matrix": 0.1}


def test_a_partition_steps_like_its_parts():
    together, apart = network(), network()
    optimizer = mixed(together)
    found = roles(apart)
    alone = [
        SGD(found["matrix"], lr=0.1, momentum=0.9),
        AdamW([{"params": found["embed"]}, {"params": found["vector"], "weight_decay": 0.0}], lr=1e-2),
    ]
    for seed in range(3):
        step(together, optimizer, seed)
        generator = torch.Generator().manual_seed(seed)
        for p in apart.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for one in alone:
            one.step()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_a_partition_resumes_exactly():
    net = network()
    optimizer = mixed(net)
    step(net, optimizer, 0)
    copy = network()
    copy.load_state_dict(net.state_dict())
    again = mixed(copy)
    again.load_state_dict(deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(net, optimizer, seed)
        step(copy, again, seed)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), copy.parameters(), strict=True))


def test_a_schedule_reaches_every_child():
    optimizer = mixed(network())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    assert {g["lr"] for child in optimizer.children for g in child.param_groups} == {0.05, 0.005}


def test_the_closure_runs_once():
    calls = []
    net = network()

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(1)
        return 3.0

    assert mixed(net).step(closure) == 3.0
    assert calls == [1]


def test_a_role_without_parameters_and_parameters_without_an_optimizer_are_refused():
    with pytest.raises(ValueError, match=r"names role 'matrixx', but the model's parameters are embed"):
        by_role(network(), partial(SGD, lr=0.1), takes=["matrixx"])
    with pytest.raises(ValueError, match=r"leaves out the roles embed, .*Try optimizer/rest=adamw"):
        by_role(network(), partial(SGD, lr=0.1), takes=["matrix"])
    with pytest.raises(ValueError, match="no trainable parameter"):
        by_role(nn.ReLU(), partial(SGD, lr=0.1))


# --- the group within the group ----------------------------------------------------------------------------------


def test_the_rest_of_a_name_is_the_optimizer_of_that_name():
    """conf/optimizer/rest/x.yaml is conf/optimizer/x.yaml but for the words about roles: those that take all."""
    own = {name: OmegaConf.load(CONF / "optimizer" / f"{name}.yaml") for name in options("optimizer")}
    named = {name for name in options("optimizer/rest") if not name.startswith("of_")}
    assert named == {name for name, node in own.items() if node.get("takes") == "all"}
    for name in named:
        expected = {key: value for key, value in own[name].items() if key not in (*WORDS, "defaults")}
        assert expected == OmegaConf.load(CONF / "optimizer" / "rest" / f"{name}.yaml")


@pytest.mark.parametrize("name", options("optimizer/rest"))
def test_any_rest_steps_what_is_left(name):
    file = OmegaConf.load(CONF / "optimizer" / "rest" / f"{name}.yaml")
    rest = instantiate(OmegaConf.create({"optimizer": {"lr": 1e-3, "rest": file}})).optimizer.rest
    net = network()
    optimizer = by_role(net, partial(SGD, lr=0.1), takes=["matrix"], rest=rest)
    assert {group["role"] for group in optimizer.children[1].param_groups} == set(roles(net)) - {"matrix"}
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_a_rest_is_a_word():
    words = ["optimizer=muon", "optimizer/rest=lion", "optimizer.rest.lr=0.25"]
    factory, about_roles = split(build("optimizer", *words))
    optimizer = by_role(network(), factory, **about_roles)
    assert [type(child).__name__ for child in optimizer.children] == ["Muon", "Lion"]
    assert {group["lr"] for group in optimizer.children[1].param_groups} == {0.25}


def test_the_rest_of_a_base():
    """optimizer/rest@optimizer.base.rest: what Hydra calls the rest of the optimizer within SAM."""
    base = compose(["optimizer=sam", "optimizer/base=muon", "optimizer/rest@optimizer.base.rest=lion"]).optimizer.base
    assert base.rest._target_ == "trainkit.optimizer.lion.Lion"
    assert compose(["optimizer=sam", "optimizer/base=muon"]).optimizer.base.rest.lr == 3e-4


def test_what_a_norm_prefers_holds_for_the_rest_wherever_it_is():
    rest = compose(["norm=nap", "optimizer=muon", "optimizer/rest=adamw"]).optimizer.rest
    words = ["norm=nap", "optimizer=sam", "optimizer/base=muon", "optimizer/rest@optimizer.base.rest=adamw"]
    assert compose(words).optimizer.base.rest == rest
    assert rest.weight_decay == 0


def test_the_file_that_sets_a_key_of_a_rest():
    for words, key, file in (
        (["optimizer=muon"], "optimizer.rest.lr", "of_muon"),
        (["optimizer=muon", "optimizer/rest=lion"], "optimizer.rest.lr", "lion"),
        (["optimizer=sam", "optimizer/base=muon"], "optimizer.base.rest.lr", "of_muon"),
        (
            ["optimizer=sam", "optimizer/base=muon", "optimizer/rest@optimizer.base.rest=lion"],
            "optimizer.base.rest.lr",
            "lion",
        ),
    ):
        job = Composition(compose(words), Folders(), parse(words, Folders()))
        assert re.fullmatch(rf" \(conf/optimizer/rest/{file}\.yaml:\d+\)", job.where(key)), words
        assert job.where("optimizer.base.rest.fused" if "lion" in file else "optimizer.base.rest.nothing") == ""


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["optimizer=lion", "optimizer/rest=adamw"],
            r"optimizer\.takes=all leaves it nothing to step\n.*takes=\[matrix\]",
        ),
        (
            ["optimizer=sam", "optimizer/rest=lion"],
            r"takes no optimizer/rest\n.*optimizer/rest@optimizer\.base\.rest=lion",
        ),
        (
            ["optimizer=muon", "optimizer/rest=lion", "optimizer.rest.lr=-1"],
            r"optimizer\.rest\.lr must not be negative",
        ),
        (["optimizer=muon", "optimizer/rest=muon"], "did you mean 'of_muon'"),
    ],
)
def test_a_rest_that_cannot_be(words, says):
    with pytest.raises(UserError, match=says):
        check(words)


def test_roles_are_named_once_and_at_all():
    with pytest.raises(ValueError, match="names no role"):
        by_role(network(), partial(SGD, lr=0.1), takes=[], rest=partial(AdamW))
    with pytest.raises(ValueError, match=r"optimizer\.rest\.lr must be positive; got 0"):
        by_role(network(), partial(SGD, lr=0.1), takes="matrix", rest=partial(AdamW, lr=0.0))
    twice = by_role(network(), partial(SGD, lr=0.1), takes=["matrix", "matrix"], rest=partial(AdamW))
    assert [group["role"] for group in twice.children[0].param_groups] == ["matrix"]
