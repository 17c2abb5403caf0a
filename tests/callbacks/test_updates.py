"""What callbacks.updates logs about a step, against what the step did."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.updates import Updates
from tests.callbacks.toy import Toy, fit, rows
from trainkit.gradient.clip import Clip


class Spy(Callback):
    """The weights, gradients and moments of every step, and the gradient of each of its micro-batches."""

    def __init__(self):
        self.before, self.after, self.gradients, self.moments, self.micro = {}, {}, {}, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before[trainer.global_step + 1] = flat(p for p in pl_module.model.parameters())
            self.sum = 0.0

    def on_after_backward(self, trainer, pl_module):
        now = flat(p.grad for p in pl_module.model.parameters()) * trainer.accumulate_grad_batches
        self.micro.setdefault(pl_module.step, []).append(now - self.sum)
        self.sum = now

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients[pl_module.step] = flat(p.grad for p in pl_module.model.parameters())

    def on_train_batch_end(self, trainer, pl_module, *_):
        state, parameters = trainer.optimizers[0].state, list(pl_module.model.parameters())
        if parameters[0] in state:
            self.after[pl_module.step] = flat(parameters)
            self.moments[pl_module.step] = flat(state[p]["exp_avg_sq"] for p in parameters)


def flat(tensors):
    return torch.cat([t.detach().double().flatten() for t in tensors])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_step_is_measured_whole_and_only_when_it_is_due(tmp_path, accumulate):
    spy = Spy()
    fit(tmp_path, [Updates(), spy], task=Toy(gradient=Clip(max_norm=1e-3)), accumulate_grad_batches=accumulate)
    logged = rows(tmp_path, "update_ratio/global")
    assert [row["step"] for row in logged] == [1, 2, 4, 6, 8, 10, 12]
    for row in logged:
        before, after, gradient = (of[row["step"]] for of in (spy.before, spy.after, spy.gradients))
        assert row["update_ratio/global"] == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert row["parameter_norm/global"] == pytest.approx(float(after.norm()), rel=1e-5)
        assert row["grad_rms/global"] == pytest.approx(float(gradient.square().mean().sqrt()), rel=1e-4)
        second = spy.moments[row["step"]].square().mean().sqrt()
        assert row["exp_avg_sq_rms/global"] == pytest.approx(float(second), rel=1e-4)
        for kind in ("update_ratio", "parameter_norm", "grad_rms", "exp_avg_rms", "exp_avg_sq_rms"):
            labels = {name.partition("/")[2] for name in row if name.startswith(f"{kind}/")}
            assert {"blocks.1.attn", "blocks.1.norm", "blocks.1", "embed", "head", "global"} <= labels
    assert row["grad_rms/global"] > 1e-3  # before clipping


def test_the_noise_is_that_of_the_micro_batches(tmp_path):
    spy = Spy()
    fit(tmp_path, [Updates(), spy], accumulate_grad_batches=4)
    found = rows(tmp_path, "gradient_noise/trace")
    assert found
    for row in found:
        micro = torch.stack(spy.micro[row["step"]])
        trace = micro.var(0, correction=1).sum() * 8  # of a sample: a micro-batch has 8
        square = micro.mean(0).square().sum() - trace / 32
        assert row["gradient_noise/trace"] == pytest.approx(float(trace), rel=1e-3)
        assert row["gradient_noise/square"] == pytest.approx(float(square), rel=1e-3)
        expected = float(trace / square) if square > 0 else math.inf
        assert row["gradient_noise/scale"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("accumulate", "noise"), [(1, True), (2, False)])
def test_no_noise_where_nothing_can_be_compared_or_nobody_asks(tmp_path, accumulate, noise):
    fit(tmp_path, [Updates(noise=noise)], accumulate_grad_batches=accumulate)
    assert rows(tmp_path, "update_ratio/global")
    assert not rows(tmp_path, "gradient_noise/trace")


def test_other_optimizers_have_states_of_other_names(tmp_path):
    fit(tmp_path, [Updates()], task=Toy(optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9)), max_steps=2)
    assert rows(tmp_path, "momentum_buffer_rms/blocks.0.mlp")
    assert not rows(tmp_path, "exp_avg_rms/global")


def test_a_run_is_the_same_with_it_and_without(tmp_path):
    states = []
    for name, callbacks in (("with", [Updates()]), ("without", [])):
        (tmp_path / name).mkdir()
        _, task = fit(tmp_path / name, callbacks, accumulate_grad_batches=2)
        states.append(task.state_dict())
        assert not any(p._backward_hooks for p in task.parameters())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
