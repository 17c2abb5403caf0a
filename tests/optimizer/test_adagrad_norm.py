"""AdaGrad-Norm in both forms, against their equations."""

import math

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from trainkit.optimizer.adagrad_norm import AdaGradNorm


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_one_accumulator_for_all_groups(momentum):
    params = toy.parameters()
    settings = {"lr": 0.5, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "momentum": momentum}
    optimizer = AdaGradNorm(
        [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.1, "lr": 0.2}], **settings
    )
    weights, averages = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    total = 0.3
    for t in range(1, 6):
        gradients = toy.give(params, t)
        total += sum(g.square().sum().item() for g in gradients)
        for i, g in enumerate(gradients):
            lr, decay = (0.5, 0.0) if i < 3 else (0.2, 0.1)
            lr /= 1 + (t - 1) * 0.1
            averages[i] = momentum * averages[i] + (1 - momentum) * g
            weights[i] = weights[i] * (1 - lr * decay) - lr * averages[i] / math.sqrt(total)
        optimizer.step()
        for p, w in zip(params, weights, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-11, atol=1e-13)


def test_parameters_without_a_gradient_still_count():
    p, q = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = AdaGradNorm([p, q], lr=1.0, initial_accumulator_value=0.0)
    p.grad, q.grad = torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double()
    optimizer.step()
    p.grad = None
    before = p.detach().clone()
    q.grad = torch.tensor([0.0, 12.0]).double()
    optimizer.step()
    assert torch.equal(p, before)
    torch.testing.assert_close(q[1].detach(), torch.tensor(-4 / 5 - 12 / 13).double())


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_one_accumulator_per_row(momentum, block, monkeypatch):
    """Filters of a convolution are rows, and so is each entry of a vector."""
    if block:
        monkeypatch.setattr("trainkit.optimizer.multi_tensor.BLOCK", block)

    def formula(t, w, g, kept):
        rows = g.reshape(g.shape[0], -1) if g.ndim > 1 else g.reshape(-1, 1)
        sums = kept["sum"] = kept.get("sum", 0.3) + rows.square().sum(1, keepdim=True)
        c = kept["c"] = momentum * kept.get("c", 0) + (1 - momentum) * rows
        lr = 0.5 / (1 + (t - 1) * 0.1)
        return w * (1 - lr * 0.1) - (lr * c / (sums.sqrt() + 1e-3)).reshape(w.shape)

    settings = {"lr_decay": 0.1, "weight_decay": 0.1, "momentum": momentum, "eps": 1e-3}
    toy.follows(lambda ps: AdaGradNorm(ps, 0.5, "row", 0.3, **settings), formula)


def test_on_vectors_the_row_form_is_adagrad():
    toy.same(
        lambda ps: AdaGradNorm(ps, lr=0.1, form="row"),
        lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.01),
        shapes=[(), (1,), (9,)],
    )


@pytest.mark.parametrize("form", ["scalar", "row"])
def test_zero_gradients_from_zero(form):
    p = nn.Parameter(torch.ones(3, 2))
    optimizer = AdaGradNorm([p], form=form, initial_accumulator_value=0.0, eps=0.0)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(p, torch.ones(3, 2))


@pytest.mark.parametrize("form", ["scalar", "row"])
def test_compiled_it_is_the_same(form):
    settings = {"lr": 0.1, "weight_decay": 0.1, "form": form}
    shapes = [(100, 90), (7,)]
    toy.same(
        lambda ps: AdaGradNorm(ps, **settings, compile=True), lambda ps: AdaGradNorm(ps, **settings), shapes=shapes
    )


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"optimizer\.form"):
        AdaGradNorm([nn.Parameter(torch.zeros(2))], form="column")
    with pytest.raises(ValueError, match=r"optimizer\.lr_decay"):
        AdaGradNorm([nn.Parameter(torch.zeros(2))], lr_decay=-1.0)


@pytest.mark.parametrize("form", ["scalar", "row"])
def test_it_resumes(form):
    toy.resumes(lambda ps: AdaGradNorm(ps, form=form, momentum=0.5))


def test_bytes():
    shapes = [(7,), (12, 5), (5, 3, 3, 3)]
    for form, size in (("scalar", 4 * 3), ("row", 4 * (7 + 12 + 5))):
        params = toy.parameters(shapes, dtype=torch.float32)
        optimizer = AdaGradNorm(params, form=form)
        toy.take(optimizer, params, 1)
        assert toy.state_bytes(optimizer) == size
