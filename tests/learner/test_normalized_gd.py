"""Gradient descent on the logistic loss, normalised and not, and the perceptron, against their formulas."""

import pytest
import torch
from torch import Tensor, nn

import trainkit
from tests.menu import build
from trainkit.learner.normalized_gd import FORMS, NormalizedGD, margins
from trainkit.report.metrics_file import read


@pytest.fixture
def separable() -> tuple[Tensor, Tensor]:
    """X: (30, 4), y = ±1, separated by a plane through the origin with a margin."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    m = x @ torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    x, m = x[m.abs() > 0.3][:30], m[m.abs() > 0.3][:30]
    return x, m.sign()


def step(form: str, x: Tensor, y: Tensor, theta: Tensor, lr: float) -> Tensor:
    """θ after one step of plain SGD on the learner's loss."""
    model = nn.Linear(x.shape[1], 1, bias=False, dtype=x.dtype)
    with torch.no_grad():
        model.weight.copy_(theta)
    loss, _ = NormalizedGD(form)(model, (x, y > 0))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=lr).step()
    return model.weight.detach().squeeze(0)


def formula(form: str, x: Tensor, y: Tensor, theta: Tensor, lr: float) -> Tensor:
    m = y * (x @ theta)
    p = 1 / (1 + m.exp())
    weights = {"gd": p / len(p), "normalized": p / p.sum(), "perceptron": (1 - m.sign()) / 2 / len(p)}[form]
    return theta + lr * (weights[:, None] * y[:, None] * x).sum(0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lr", [0.1, 1.0, 30.0])
def test_a_trajectory_is_the_formula(form, lr, separable):
    found = expected = torch.zeros(4, dtype=torch.float64)  # all are ties at first
    for _ in range(10):
        found, expected = step(form, *separable, found, lr), formula(form, *separable, expected, lr)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_from_zero_the_step_is_twice_that_of_gradient_descent(separable):
    zero = torch.zeros(4, dtype=torch.float64)
    torch.testing.assert_close(step("normalized", *separable, zero, 1.0), 2 * step("gd", *separable, zero, 1.0))


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3, 1e6])
def test_the_step_is_an_average_of_the_samples_however_large_the_margins(scale, separable):
    """‖Δθ‖ <= γ max‖x‖, and it does not vanish where every probability underflows."""
    x, y = separable
    theta = scale * torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    moved = step("normalized", x, y, theta, 1.0) - theta
    assert 0.05 < moved.norm() <= x.norm(dim=1).max()
    if scale == 1e6:  # all of the weight is on the smallest margin
        nearest = (y * (x @ theta)).argmin()
        torch.testing.assert_close(moved, y[nearest] * x[nearest], rtol=1e-6, atol=1e-6)
        assert torch.equal(step("gd", x, y, theta, 1.0), theta)


@pytest.mark.parametrize("lr", [0.01, 1.0, 100.0])
def test_separable_data_are_separated_at_any_rate(lr, separable):
    x, y = separable
    theta = torch.zeros(4, dtype=torch.float64)
    for _ in range(300):
        theta = step("normalized", x, y, theta, lr)
    assert (y * (x @ theta) > 0).all()


def test_it_separates_sooner_than_gradient_descent_with_a_small_rate():
    """One hard sample among many easy ones: its share of the mean gradient is small."""
    x = torch.tensor([[1.0, 0.0]] * 50 + [[-0.05, 0.3]], dtype=torch.float64)
    y = torch.ones(51, dtype=torch.float64)

    def steps(form: str) -> int:
        theta = torch.zeros(2, dtype=torch.float64)
        for number in range(5000):
            if (y * (x @ theta) > 0).all():
                return number
            theta = step(form, x, y, theta, 1.0)
        return 5000

    assert 0 < steps("normalized") < steps("gd") / 2


def test_two_logits_are_one_and_more_classes_have_their_margin():
    logits = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    p = 1 - logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(torch.sigmoid(-margins(logits, labels)), p)
    pair = logits[:, :2]
    torch.testing.assert_close(margins(pair, labels % 2), margins(pair[:, 1:] - pair[:, :1], labels % 2))
    assert margins(logits.half(), labels).dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_that_is_logged_is_the_cross_entropy(form):
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 4), (torch.randn(8, 3), torch.arange(8) % 4)
    loss, logged = NormalizedGD(form)(model, batch)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(batch[0]), batch[1]))
    assert 0 < logged["error_probability"] < 1


def test_a_form_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"learner\.form must be one of gd, normalized, perceptron; got 'l2'"):
        NormalizedGD("l2")  # type: ignore[arg-type]
    assert build("learner", "model=mlp", "learner=normalized_gd").form == "normalized"


def test_it_trains_through_the_users_door(tmp_path):
    words = ["model=mlp", "model.depth=1", "model.width=16", "learner=normalized_gd", "optimizer=sgd", "gradient=none"]
    words += ["optimizer.lr=0.1", "schedule=constant", "schedule.warmup=0", "trainer.max_steps=30", "logger=none"]
    words += ["trainer.threads=1", "data.batch_size=200", f"paths.log_dir={tmp_path}", "callbacks=none"]
    result = trainkit.run(words)
    rows = [row for row in read(result.dir / "metrics.jsonl") if "train/loss" in row]
    assert rows[-1]["train/loss"] < 0.5 * rows[0]["train/loss"]
    assert rows[-1]["train/error_probability"] < 0.5 * rows[0]["train/error_probability"]
