"""What the callbacks log while a task trains: gradient norms, learning rate, speed."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import throughput
from callbacks.grad_norm import GradNorm
from callbacks.learning_rate import LearningRate
from callbacks.throughput import Throughput
from tests.callbacks.toy import Toy, fit, rows
from trainkit.gradient.clip import Clip
from trainkit.schedule.linear import linear


class Spy(Callback):
    """Keeps the gradients that an optimizer step is about to be made with, before they are treated."""

    def __init__(self):
        self.gradients = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        model = pl_module.model
        self.gradients[trainer.global_step + 1] = {n: p.grad.double().clone() for n, p in model.named_parameters()}


def norm(gradients, *prefixes):
    """The L2 norm of the gradients of the parameters below any of the prefixes."""
    return sum(g.square().sum().item() for n, g in gradients.items() if n.startswith(prefixes)) ** 0.5


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_norms_are_of_the_whole_step_and_before_clipping(tmp_path, accumulate):
    spy = Spy()
    task = Toy(gradient=Clip(max_norm=1e-3))
    fit(tmp_path, [GradNorm(), spy], task=task, accumulate_grad_batches=accumulate)
    logged = rows(tmp_path, "grad_norm/global")
    assert [row["step"] for row in logged] == [1, 2, 4, 6, 8, 10, 12]
    for row in logged:
        gradients = spy.gradients[row["step"]]
        assert row["grad_norm/global"] == pytest.approx(norm(gradients, ""), rel=1e-5)
        assert row["grad_norm/blocks.1.attn"] == pytest.approx(norm(gradients, "blocks.1.attn.f"), rel=1e-5)
        assert row["grad_norm/blocks.1.norm"] == pytest.approx(
            norm(gradients, "blocks.1.attn.pre", "blocks.1.mlp.pre"), rel=1e-5
        )
        assert row["grad_norm/blocks.1"] == pytest.approx(norm(gradients, "blocks.1"), rel=1e-5)
        assert row["grad_norm/head"] == pytest.approx(norm(gradients, "head"), rel=1e-5)
        assert row["grad_norm/clipped"] == pytest.approx(1e-3, rel=1e-2)
        assert row["grad_norm/global"] > 0.01
        assert row["grad_norm/global_l1"] == pytest.approx(sum(g.abs().sum().item() for g in gradients.values()), 1e-5)


def test_the_learning_rate_is_the_one_that_the_step_was_made_with(tmp_path):
    task = Toy(lr=0.1, schedule=partial(linear, warmup=0, final=0.0))
    fit(tmp_path, [LearningRate()], task=task, max_steps=10, log_every_n_steps=1)
    rates = [row["lr"] for row in rows(tmp_path, "lr")]
    factor = linear(total=10, warmup=0, final=0.0)
    assert rates == pytest.approx([0.1 * factor(step) for step in range(10)])
    assert not rows(tmp_path, "lr/matrix")


def test_rates_that_differ_are_logged_by_role(tmp_path):
    class TwoRates(Toy):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(
                [
                    {"params": self.model.head.parameters(), "lr": 0.1, "role": "head"},
                    {"params": self.model.blocks.parameters(), "lr": 0.2, "role": "matrix"},
                ]
            )
            super().configure_optimizers()
            return optimizer

    fit(tmp_path, [LearningRate()], task=TwoRates(), max_steps=1)
    (row,) = rows(tmp_path)
    assert {name: row[name] for name in row if name.startswith("lr")} == {"lr": 0.1, "lr/head": 0.1, "lr/matrix": 0.2}


class Clock:
    """A clock that stands still but for what the run is made to take: per batch, validation and checkpoint."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(throughput, "_now", lambda trainer: self.now)
        monkeypatch.setattr(throughput.time, "perf_counter", lambda: self.now)


class Takes(Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_before_backward(self, trainer, pl_module, loss):
        self.clock.now += 0.5

    def on_validation_end(self, trainer, pl_module):
        self.clock.now += 1000.0
        trainer.save_checkpoint(f"{trainer.default_root_dir}/x.ckpt")
        self.clock.now += 1000.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_throughput_counts_training_alone(tmp_path, monkeypatch, accumulate):
    speed = Throughput()
    fit(tmp_path, [speed, Takes(Clock(monkeypatch))], accumulate_grad_batches=accumulate, log_every_n_steps=3)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == [1, 3, 6, 9, 12]
    assert "tokens_per_second" not in logged[0]  # the clock had not been started
    for row in logged[1:]:
        assert row["steps_per_second"] == pytest.approx(2 / accumulate)
        assert row["tokens_per_second"] == pytest.approx(2 / accumulate * Toy.tokens_per_step)
        assert "mfu" not in row  # nobody knows the peak of this CPU


def test_mfu_is_the_share_of_the_peak(tmp_path, monkeypatch):
    class Counted(Toy):
        flops_per_token = 50

    monkeypatch.setattr(throughput, "half_peak", lambda trainer: 1e4)
    fit(tmp_path, [Throughput(), Takes(Clock(monkeypatch))], task=Counted())
    assert rows(tmp_path)[-1]["mfu"] == pytest.approx(2 * Toy.tokens_per_step * 50 / 1e4)


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989.4e12),
        ("NVIDIA H100 PCIe", "16-mixed", 756e12),
        ("NVIDIA A100-SXM4-80GB", "bf16-true", 312e12),
        ("NVIDIA L40S", "bf16-mixed", 362e12),
        ("NVIDIA L4", "bf16-mixed", 121e12),
        ("NVIDIA H100 80GB HBM3", "32-true", None),
        ("Somebody's GPU", "bf16-mixed", None),
    ],
)
def test_the_peak_is_that_of_the_device_or_unknown(monkeypatch, name, precision, peak):
    class Trainer:
        class strategy:
            root_device = torch.device("cuda", 0)

    Trainer.precision = precision
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert throughput.half_peak(Trainer) == peak
