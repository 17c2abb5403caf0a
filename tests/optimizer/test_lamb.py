"""LAMB, against its equations in the order of timm's step, written for whole lists."""

import math

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from trainkit.optimizer.lamb import LAMB

DEFAULTS = {
    "lr": 0.01,
    "betas": (0.9, 0.99),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "bias_correction": True,
    "grad_averaging": True,
    "max_grad_norm": 1.0,
    "trust_clip": False,
    "always_adapt": False,
    "caution": False,
    "decoupled_decay": False,
    "corrected_weight_decay": False,
}


class Equations:
    """All parameters at once, as the norm of all gradients needs."""

    def __init__(self, params, decays, settings):
        self.weights = [p.detach().clone() for p in params]
        self.decays, self.s, self.t = decays, settings, 0
        self.m, self.v = [0.0] * len(params), [0.0] * len(params)

    def step(self, gradients, lr):
        s, (b1, b2) = self.s, self.s["betas"]
        self.t += 1
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        clip = max(1.0, norm / s["max_grad_norm"]) if s["max_grad_norm"] is not None else 1.0
        c1, c2 = (1 - b1**self.t, 1 - b2**self.t) if s["bias_correction"] else (1.0, 1.0)
        for i, g in enumerate(gradients):
            g, w, decay = g / clip, self.weights[i], self.decays[i]
            self.m[i] = b1 * self.m[i] + ((1 - b1) if s["grad_averaging"] else 1.0) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
            u = self.m[i] / c1 / ((self.v[i] / c2).sqrt() + s["eps"])
            if s["caution"]:
                mask = (u * g > 0).double()
                u = u * mask / mask.mean().clamp(min=1e-3)
            if decay and s["decoupled_decay"]:
                w = w * (1 - (lr * lr / s["lr"] if s["corrected_weight_decay"] else lr) * decay)
            elif decay:
                u = u + decay * w
            r = 1.0
            if decay or s["always_adapt"]:
                if w.norm() > 0 and u.norm() > 0:
                    r = (w.norm() / u.norm()).item()
                r = min(r, 1.0) if s["trust_clip"] else r
            self.weights[i] = w - lr * r * u


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"max_grad_norm": None, "always_adapt": True, "trust_clip": True, "bias_correction": False},
        {"max_grad_norm": 100.0, "grad_averaging": False},
        {"caution": True},
        {"caution": True, "decoupled_decay": True, "always_adapt": True},
        {"decoupled_decay": True, "corrected_weight_decay": True},
    ],
    ids=lambda changed: "-".join(changed) or "default",
)
@pytest.mark.parametrize("block", [None, 16])
def test_the_equations(changed, block, monkeypatch):
    if block:
        monkeypatch.setattr("trainkit.optimizer.multi_tensor.BLOCK", block)
        monkeypatch.setattr("trainkit.optimizer.multi_tensor.WINDOW", 40)
    settings = {**DEFAULTS, **changed}
    params = toy.parameters()
    matrices, vectors = [p for p in params if p.ndim > 1], [p for p in params if p.ndim < 2]
    optimizer = LAMB([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **settings)
    params = [*matrices, *vectors]
    equations = Equations(params, [settings["weight_decay"]] * len(matrices) + [0.0] * len(vectors), settings)
    for t in range(1, 6):
        lr = settings["lr"] / t
        for group in optimizer.param_groups:
            group["lr"] = lr
        given = toy.give(params, t)
        before = [g.clone() for g in given]
        equations.step(before, lr)
        optimizer.step()
        for p, w, g, old in zip(params, equations.weights, given, before, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-12)
            assert torch.equal(g, old), "the gradient was changed"


def test_a_step_is_as_long_as_lr_times_the_weight():
    params = toy.parameters()
    optimizer = LAMB(params, lr=0.01, weight_decay=0.0, always_adapt=True, max_grad_norm=None)
    for t in range(1, 4):
        before = [p.detach().clone() for p in params]
        toy.take(optimizer, params, 1, first=t)
        for p, w in zip(params, before, strict=True):
            torch.testing.assert_close((p.detach() - w).norm(), 0.01 * w.norm())


def test_it_is_adamw_where_the_ratio_is_one():
    """Of weights longer than their steps, clipped, with the decay apart."""
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}

    def lamb(ps):
        for p in ps:
            p.data.mul_(100)
        return LAMB(ps, **settings, decoupled_decay=True, trust_clip=True, max_grad_norm=None)

    def adamw(ps):
        for p in ps:
            p.data.mul_(100)
        return torch.optim.AdamW(ps, **settings)

    toy.same(lamb, adamw, shapes=[(12, 5), (4, 9)])


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"caution": True, "decoupled_decay": True, "grad_averaging": False},
    ],
)
def test_compiled_it_is_the_same(changed):
    shapes = [(100, 90), (7,), (130, 70)]
    settings = {**DEFAULTS, **changed}
    toy.same(lambda ps: LAMB(ps, **settings, compile=True), lambda ps: LAMB(ps, **settings), shapes=shapes)


@pytest.mark.parametrize("scales", [(1e-6, 1, 1), pytest.param((1, 1e-6, 1), marks=pytest.mark.slow)])
def test_compiled_it_clips_when_gradients_are_long_and_only_then(scales):
    """With a second group that is never clipped."""

    def moments(compile):
        params = toy.parameters([(100, 90), (100, 90)])
        groups = [{"params": [params[0]]}, {"params": [params[1]], "max_grad_norm": None}]
        optimizer = LAMB(groups, lr=0.01, compile=compile)
        for t, scale in enumerate(scales):
            for p, g in zip(params, toy.gradients(params, t), strict=True):
                p.grad = g * scale
            optimizer.step()
        return [optimizer.state[p]["exp_avg"] for p in params]

    torch.testing.assert_close(moments(True), moments(False), rtol=1e-11, atol=0.0)


def test_a_gradient_that_is_no_number_is_no_clipping_of_1():
    p, q = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = LAMB([p, q], lr=0.01)
    p.grad, q.grad = torch.full_like(p, 5.0), torch.ones_like(q)
    q.grad[0, 0] = math.nan
    optimizer.step()
    assert optimizer.state[p]["exp_avg"].isnan().all()  # as the equation has it, the norm being one of all gradients


def test_zero_weights_and_gradients_give_ratio_one():
    p, q = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = LAMB([p, q], lr=0.01, weight_decay=0.1, max_grad_norm=None)
    p.grad, q.grad = torch.ones_like(p), torch.zeros_like(q)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((4, 3), -0.01))
    torch.testing.assert_close(q.detach(), torch.full((4, 3), 0.99))  # u = 0.1 W, whose length becomes ‖W‖


@pytest.mark.parametrize(("key", "value"), [("max_grad_norm", 0.0), ("eps", -1.0), ("betas", (0.9, 1.0))])
def test_settings_out_of_range(key, value):
    with pytest.raises(ValueError, match=f"optimizer.{key}"):
        LAMB([nn.Parameter(torch.zeros(2))], **{key: value})


def test_it_resumes():
    toy.resumes(lambda ps: LAMB(ps, lr=0.1))


def test_bytes():
    params = toy.parameters(dtype=torch.float32)
    optimizer = LAMB(params)
    toy.take(optimizer, params, 1)
    assert toy.state_bytes(optimizer) == 8 * sum(p.numel() for p in params)
