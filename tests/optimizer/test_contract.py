"""What every optimizer of the menu keeps to, as a run builds it: by roles, with its rest."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from tests.menu import options
from trainkit.launch.compose import compose
from trainkit.launch.job import make
from trainkit.optimizer.partition import by_role, split

NAMES = options("optimizer")
RATES = (10.0, 1.0, 0.1, 0.03, 0.01, 1e-3)
SMALL = {"rank": 2, "update_proj_gap": 3, "trust_coeff": 0.02}  # settings that a small matrix or a short test needs
# One number for all parameters together: what one does is not what it would do alone.
WHOLE = {"lamb", "adagrad_norm", "sam", "asam"}
Loss = Callable[[nn.Module], Tensor]


class Net(nn.Module):
    """Every role, tall, wide and square matrices, a filter bank, vectors and a scalar."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(2, 4, 3, bias=False)
        self.wide, self.tall, self.square = nn.Linear(6, 4), nn.Linear(4, 8), nn.Linear(8, 8)
        self.scalar = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 5)
        self.head.role = "head"  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tall(torch.tanh(self.wide(self.embed(tokens))))
        return self.head(torch.tanh(self.square(x)) * self.scalar) + self.conv.weight.square().mean()


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


@cache
def configured(name: str) -> DictConfig:
    return compose([f"optimizer={name}"])


def optimizer(name: str, model: nn.Module, **settings: Any) -> Optimizer:
    """As a run builds it, with these settings wherever it has them: its own, its base's, and lr also its rest's."""
    cfg = deepcopy(configured(name))
    node = cfg.optimizer
    for place in (node, node.get("base") or {}):
        for key, value in {**SMALL, **settings}.items():
            if key in place:
                place[key] = value
    if node.get("rest") and "lr" in settings:
        node.rest.lr = settings["lr"]
    factory, words = split(make(cfg, "optimizer"))
    return by_role(model, factory, **words)


TOKENS = torch.arange(7)
TARGETS = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fit(model: nn.Module) -> Tensor:
    return (model(TOKENS) - TARGETS.to(next(model.parameters()).dtype)).square().mean()


def train(model: nn.Module, made: Optimizer, steps: int, loss: Loss = fit) -> list[float]:
    losses = []

    def closure() -> Tensor:
        made.zero_grad()
        value = loss(model)
        value.backward()
        losses.append(value.item())
        return value

    for _ in range(steps):
        made.step(closure)
    return losses


names = pytest.mark.parametrize("name", NAMES)


# --- it optimizes -------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """A matrix alone, in a model whose roles are all there are."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.layer = nn.Linear(start.shape[1], start.shape[0], bias=False, dtype=start.dtype)
        self.bias = nn.Parameter(torch.zeros(start.shape[0], dtype=start.dtype))
        with torch.no_grad():
            self.layer.weight.copy_(start)


def quadratic(model: nn.Module) -> Tensor:
    scale = torch.arange(1, 7, dtype=torch.float64)
    return ((model.layer.weight - 1).square() * scale).mean() + (model.bias - 1).square().mean()


def rosenbrock(model: nn.Module) -> Tensor:
    x, y = model.layer.weight[:, :3], model.layer.weight[:, 3:]
    return ((1 - x).square() + 10 * (y - x.square()).square()).mean() + model.bias.square().mean()


def regression(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    goal = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    return ((inputs @ (model.layer.weight - goal).T) + model.bias).square().mean()


@names
@pytest.mark.parametrize(("problem", "factor"), [(quadratic, 0.3), (rosenbrock, 0.5), (regression, 0.3)])
def test_it_lowers(name, problem, factor):
    """At the best of a few learning rates."""
    if name == "swan" and problem is quadratic:
        factor = 0.7  # it centres the rows of a gradient, so a row's mean stays where it began
    best = float("inf")
    for lr in RATES:
        torch.manual_seed(0)
        model = Point(torch.randn(4, 6, dtype=torch.float64) * 0.5)
        losses = train(model, optimizer(name, model, lr=lr), 80, problem)
        best = min(best, losses[-1] / losses[0])
        if best < factor:
            break
    assert best < factor


# --- it resumes ---------------------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_goes_on_after_a_load_as_if_nothing_had_been(name, dtype):
    model = net(dtype)
    made = optimizer(name, model)
    train(model, made, 4)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": made.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(model, made, 4)

    other = net(dtype)
    again = optimizer(name, other)
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    train(other, again, 4)
    for (parameter, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), parameter


# --- what comes in ------------------------------------------------------------------------------------------------


# torch's own keeps its sums of squares in the parameters' dtype, where float16 underflows.
names_for_half = pytest.mark.parametrize("name", [name for name in NAMES if name != "adagrad"])


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_precision(name, dtype):
    if name == "adagrad" and dtype == torch.float16:
        pytest.skip("torch.optim.Adagrad keeps its sums of squares in float16, where they underflow")
    """Parameters keep their dtype and stay finite, and the loss falls."""
    best = float("inf")
    for lr in (0.1, 0.03, 0.01):
        model = net(dtype)
        losses = train(model, optimizer(name, model, lr=lr), 40)
        assert all(p.dtype == dtype for p in model.parameters())
        if all(p.isfinite().all() for p in model.parameters()):
            best = min(best, losses[-1] / losses[0])
        if best < 0.9:
            break
    assert best < 0.9


# Conda's basis turns with the last bits where singular values lie close together.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "conda"])
def test_accumulated_gradients_are_their_sum(name):
    together, apart = net(), net()
    one, two = optimizer(name, together), optimizer(name, apart)
    for _ in range(3):

        def whole() -> None:
            one.zero_grad()
            fit(together).backward()

        def parts() -> None:
            two.zero_grad()
            for rows in (slice(0, 3), slice(3, 7)):
                share = (apart(TOKENS[rows]) - TARGETS[rows]).square().sum() / TARGETS.numel()
                share.backward()

        one.step(whole)
        two.step(parts)
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)  # roots of tiny squares


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE])
def test_lists_of_tensors_do_what_a_loop_does(name):
    """The parameters stepped together, and each by an optimizer of its own."""
    together, apart = net(), net()
    one = optimizer(name, together)
    group_of = {id(p): group for group in one.param_groups for p in group["params"]}
    children = getattr(one, "children", [one])
    alone = []
    for p, q in zip(together.parameters(), apart.parameters(), strict=True):
        group = {k: v for k, v in group_of[id(p)].items() if k != "params"}
        child = next(c for c in children if any(p is r for g in c.param_groups for r in g["params"]))
        defaults = {k: v for k, v in child.defaults.items() if k in ("lr",)}
        alone.append(type(child)([{**group, "params": [q]}], **defaults))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(together.parameters(), apart.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            q.grad = p.grad.clone()
        one.step()
        for made in alone:
            made.step()
    for (parameter, a), b in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=parameter)


@names
def test_a_parameter_without_a_gradient_stays(name):
    model = net()
    made = optimizer(name, model)
    train(model, made, 2)
    still = {id(model.wide.weight), id(model.wide.bias)}
    before = {id(p): p.detach().clone() for p in model.parameters()}

    def closure() -> None:
        made.zero_grad()
        fit(model).backward()
        model.wide.weight.grad = model.wide.bias.grad = None

    for _ in range(2):
        made.step(closure)
    for p in model.parameters():
        assert torch.equal(p, before[id(p)]) == (id(p) in still)
    losses = train(model, made, 2)
    assert all(torch.tensor(losses).isfinite())


@names
@pytest.mark.parametrize("weights", ["zero", "as they are"])
def test_zero_gradients_and_zero_weights_give_numbers(name, weights):
    model = net()
    if weights == "zero":
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
    made = optimizer(name, model)

    def zeros() -> None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

    for _ in range(3):
        made.step(zeros)
    train(model, made, 2)
    assert all(p.isfinite().all() for p in model.parameters())


@names_for_half
def test_tiny_gradients_do_not_underflow_to_nan(name):
    model = net(torch.float16)
    made = optimizer(name, model)

    def tiny() -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, 6e-8)

    for _ in range(3):
        made.step(tiny)
    assert all(p.isfinite().all() for p in model.parameters())


@names
def test_a_gradient_that_is_not_a_number_is_not_hidden(name):
    """It shows in the parameter or its state (the sign of NaN is 0), or in an error (a decomposition refuses NaN)."""
    model = net()
    made = optimizer(name, model)

    def closure() -> None:
        made.zero_grad()
        fit(model).backward()
        model.square.weight.grad[0, 0] = float("nan")

    try:
        made.step(closure)
    except RuntimeError as error:
        assert "non-finite" in str(error) or "infs or NaNs" in str(error)  # noqa: PT017
        return
    state = [t for t in made.state[model.square.weight].values() if isinstance(t, Tensor)]
    assert not all(t.isfinite().all() for t in (model.square.weight, *state))


@names
def test_the_closure_is_run_and_its_loss_returned(name):
    model = net()
    made = optimizer(name, model)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        made.zero_grad()
        loss = fit(model)
        loss.backward()
        calls.append(loss.item())
        return loss

    returned = made.step(closure)
    assert returned.item() == calls[0]
    assert len(calls) == (2 if name in ("sam", "asam") else 1)


@names
@pytest.mark.parametrize("lr", [0.0, -0.1])
def test_a_learning_rate_is_positive(name, lr):
    with pytest.raises(Exception, match=r"(?i)learning rate|\blr\b"):
        optimizer(name, net(), lr=lr)


@pytest.mark.parametrize("name", [n for n in NAMES if "betas" in configured(n).optimizer])
@pytest.mark.parametrize("betas", [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9]])
def test_betas_lie_below_one(name, betas):
    with pytest.raises(Exception, match=r"(?i)beta"):
        optimizer(name, net(), betas=betas)


@pytest.mark.parametrize("name", [n for n in NAMES if "rank" in configured(n).optimizer])
def test_a_rank_larger_than_the_smaller_side_is_one_sentence(name):
    model = net()

    def first_step() -> None:
        train(model, optimizer(name, model, rank=500), 1)

    with pytest.raises(ValueError, match=r"optimizer\.rank") as caught:
        first_step()
    assert "\n" not in str(caught.value)
