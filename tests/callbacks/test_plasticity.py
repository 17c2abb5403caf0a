"""What callbacks=plasticity logs, when, and that it leaves no trace in the run."""

import csv
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from callbacks.plasticity import Plasticity, evaluating
from callbacks.probing import probe
from tests.callbacks.toy import WIDTH, Batches, Network, Toy, ToyData, fit, rows
from trainkit.measure import plasticity as measure
from trainkit.norm_layer.batch import BatchNorm
from trainkit.optimizer.partition import Partition
from trainkit.report.figures import draw

UNITS = ("dormant", "dead", "active", "srank", "effective_rank", "stable_rank")
WEIGHTS = ("weight_norm", "effective_lr", "angular_update")
READ = ("blocks.0.attn.f", "blocks.0.mlp.f.0", "blocks.1.attn.f", "blocks.1.mlp.f.0", "head")


class Normalized(Toy):
    """With batch statistics, which an evaluation in the wrong mode would move, and dropout, which would draw."""

    def __init__(self, **changed):
        super().__init__(**changed)
        self.model.embed = nn.Sequential(self.model.embed, BatchNorm(WIDTH), nn.ReLU())


def without_dropout() -> Normalized:
    """Its steps depend on the batches alone."""
    task = Normalized()
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return task


class Tasks(ToyData):
    """Three tasks, of 5, 4 and 3 steps."""

    def ends(self):
        return [5, 9, 12]


def run(folder, callbacks, monkeypatch=None, **options):
    folder.mkdir(exist_ok=True)
    if monkeypatch is not None:
        monkeypatch.setattr("tests.callbacks.toy.ToyData", Tasks)
    return fit(folder, callbacks, **options)


class Spy(Callback):
    """The weights before and after every step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = {name: weight.detach().clone() for name, weight in measure.weights(pl_module.model).items()}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            after = {name: weight.detach().clone() for name, weight in measure.weights(pl_module.model).items()}
            self.seen[trainer.global_step] = self.before, after


@pytest.mark.parametrize("accumulate", [1, 2])
def test_everything_is_logged_by_layer_when_it_is_due(tmp_path, accumulate):
    spy = Spy()
    fit(tmp_path, [Plasticity(every=5), spy], accumulate_grad_batches=accumulate)
    logged = rows(tmp_path, "dormant/head")
    assert [row["step"] for row in logged] == [5, 10, 12]
    for row in logged:
        before, after = spy.seen[row["step"]]
        assert {name.partition("/")[2] for name in row if name.startswith("srank/")} == {*READ, "mean"}
        for layer in READ:
            assert all(math.isfinite(row[f"{kind}/{layer}"]) for kind in UNITS)
        for layer, weight in after.items():
            norm = weight.double().norm().item()
            assert row[f"weight_norm/{layer}"] == pytest.approx(norm, rel=1e-5)
            assert row[f"effective_lr/{layer}"] == pytest.approx(0.01 / norm, rel=1e-5)  # AdamW
            cosine = torch.cosine_similarity(before[layer].double().flatten(), weight.double().flatten(), dim=0)
            assert row[f"angular_update/{layer}"] == pytest.approx(math.acos(cosine.item()), rel=1e-3)
            assert row[f"angular_update/{layer}"] > 1e-4
        mean = sum(row[f"weight_norm/{layer}"] for layer in after) / len(after)
        assert row["weight_norm/mean"] == pytest.approx(mean, rel=1e-5)


def test_the_numbers_are_those_of_the_probe_in_eval_mode(tmp_path):
    _, task = fit(tmp_path, [Plasticity(every=12, samples=16, tau=0.5, srank_delta=0.2)])
    model = task.model.eval()
    with torch.no_grad():
        x = model.embed(torch.cat(list(Batches(2))))
        for block in model.blocks:
            x = block(x)
    (row,) = rows(tmp_path, "dormant/head")
    assert row["dormant/head"] == pytest.approx(float(measure.dormant_fraction(x, 0.5)))
    assert row["dead/head"] == pytest.approx(float(measure.dead_fraction(x)))
    assert row["active/head"] == pytest.approx(float(measure.active_fraction(x)))
    assert row["srank/head"] == float(measure.srank(x, 0.2))
    assert row["effective_rank/head"] == pytest.approx(float(measure.effective_rank(x)), rel=1e-5)
    assert row["stable_rank/head"] == pytest.approx(float(measure.stable_rank(x)), rel=1e-5)


def test_a_run_is_the_same_with_it_and_without(tmp_path):
    drawn = []

    class Draws(Callback):
        def on_train_batch_end(self, *_):
            drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))

    states = []
    for name, callbacks in (("with", [Plasticity(every=2)]), ("without", [])):
        random.seed(0)
        np.random.seed(0)
        _, task = run(tmp_path / name, [*callbacks, Draws()], task=Normalized())
        assert rows(tmp_path / name, "bn_mean_drift/embed.1") if callbacks else True
        states.append((task.state_dict(), [m.training for m in task.modules()]))
    assert states[0][0].keys() == states[1][0].keys()
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    assert states[0][1] == states[1][1]
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]
    losses = [[row["train/loss"] for row in rows(tmp_path / name)] for name in ("with", "without")]
    assert losses[0] == losses[1]


def test_task_ends_are_looked_at_and_statistics_drift_from_each_tasks_start(tmp_path, monkeypatch):
    snapshots = {0: measure.statistics(Normalized().model)}

    class Statistics(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            snapshots[trainer.global_step] = measure.statistics(pl_module.model)

    run(tmp_path, [Plasticity(every=4), Statistics()], monkeypatch, task=Normalized())
    logged = rows(tmp_path, "bn_mean_drift/embed.1")
    assert [row["step"] for row in logged] == [4, 5, 8, 9, 12]
    for row, start in zip(logged, (0, 0, 5, 5, 9), strict=True):
        ((mean, var),) = measure.drift(snapshots[start], snapshots[row["step"]]).values()
        assert row["bn_mean_drift/embed.1"] == pytest.approx(float(mean), rel=1e-5)
        assert row["bn_var_drift/embed.1"] == pytest.approx(float(var), rel=1e-5)


def test_a_resumed_run_logs_what_the_unbroken_one_does(tmp_path, monkeypatch):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "7.ckpt")

    run(tmp_path / "whole", [Plasticity(every=4), Saves()], monkeypatch, task=without_dropout())
    run(tmp_path / "rest", [Plasticity(every=4)], task=without_dropout(), checkpoint=tmp_path / "7.ckpt")
    name = "bn_mean_drift/embed.1"
    whole = [row[name] for row in rows(tmp_path / "whole", name) if row["step"] > 7]
    assert [row[name] for row in rows(tmp_path / "rest", name)] == whole
    assert len(whole) == 3


@pytest.mark.parametrize(
    ("optimizer", "scale_free", "power"),
    [
        (torch.optim.SGD, None, 2),
        (torch.optim.SGD, True, 1),
        (torch.optim.AdamW, None, 1),
        (torch.optim.AdamW, False, 2),
    ],
)
def test_the_effective_rate_follows_the_optimizer_or_the_option(tmp_path, optimizer, scale_free, power):
    task = Toy(optimizer=partial(optimizer, lr=0.01))
    fit(tmp_path, [Plasticity(every=1, scale_free=scale_free)], task=task, max_steps=1)
    (row,) = rows(tmp_path, "effective_lr/head")
    assert row["effective_lr/head"] == pytest.approx(0.01 / row["weight_norm/head"] ** power, rel=1e-5)


def test_each_layers_rate_is_its_own_optimizers(tmp_path):
    class Mixed(Toy):
        def configure_optimizers(self):
            super().configure_optimizers()
            head = [p for name, p in self.model.named_parameters() if name.startswith("head")]
            others = [p for name, p in self.model.named_parameters() if not name.startswith("head")]
            return Partition([torch.optim.SGD(head, lr=0.1), torch.optim.AdamW(others, lr=0.02)])

    fit(tmp_path, [Plasticity(every=1)], task=Mixed(), max_steps=1)
    (row,) = rows(tmp_path, "effective_lr/head")
    assert row["effective_lr/head"] == pytest.approx(0.1 / row["weight_norm/head"] ** 2, rel=1e-5)
    assert row["effective_lr/embed"] == pytest.approx(0.02 / row["weight_norm/embed"], rel=1e-5)


class Convolutional(nn.Module):
    """One convolution is called twice; the first one reads the input; some of its units are dead."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 1)
        with torch.no_grad():
            self.first.weight[:2] = 0
            self.first.bias[:2] = -1

    def forward(self, x):
        h = self.first(x.reshape(-1, 1, 2, 2)).relu()
        h = self.twice(self.twice(h)).relu()
        return self.head(h.mean((-2, -1)))


def test_units_of_convolutions_are_their_channels(tmp_path):
    task = Toy(lr=1e-9)
    task.model = Convolutional()
    fit(tmp_path, [Plasticity(every=1)], task=task, max_steps=1)
    (row,) = rows(tmp_path, "dead/twice")
    x = torch.cat(list(Batches(2))).reshape(-1, 1, 2, 2)
    with torch.no_grad():
        h = task.model.first(x).relu()
        both = torch.cat([h, task.model.twice(h)])
    assert row["dead/twice"] == pytest.approx(float(measure.dead_fraction(both)))
    assert row["dormant/twice"] == pytest.approx(float(measure.dormant_fraction(both)))
    assert "dead/first" not in row


def test_a_network_without_layers_or_with_one_logs_what_there_is(tmp_path):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x):
            return (x * self.gain).sum(-1, keepdim=True)

    for name, model in (("none", Scale()), ("one", nn.Linear(WIDTH, 1))):
        task = Toy()
        task.model = model
        run(tmp_path / name, [Plasticity(every=1)], task=task, max_steps=1)
    assert not rows(tmp_path / "none", "weight_norm/mean")
    (row,) = rows(tmp_path / "one", "weight_norm/mean")
    assert "dormant/mean" not in row


def test_a_run_that_diverged_is_measured_all_the_same(tmp_path):
    fit(tmp_path, [Plasticity(every=6)], task=Toy(poison=math.nan, poison_at=6))
    found = rows(tmp_path, "srank/head")[-1]
    assert math.isnan(found["srank/head"])
    assert math.isnan(found["dormant/mean"])


def test_the_probe_is_spread_over_the_set():
    batches = [torch.full((4, 1), float(n)) for n in range(10)]
    assert [int(b[0]) for b in probe(batches, 8)] == [2, 7]
    assert [int(b[0]) for b in probe(batches, 9)] == [1, 5, 8]
    assert len(probe(batches, 1)) == 1
    assert sum(len(batch) for batch in probe(batches, 2)) == 2
    assert len(probe(batches, 1000)) == 10
    assert len(probe([(b, b) for b in batches], 8)) == 2
    with pytest.raises(ValueError, match="validation samples"):
        probe([], 8)


def test_modes_come_back_one_by_one():
    model = Network()
    model.head.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert model.training
    assert not model.head.training


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"every": 0}, "every must be at least 1"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"tau": -1.0}, "tau must not be negative"),
        ({"tau": math.nan}, "tau must not be negative"),
        ({"srank_delta": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_that_make_no_sense(wrong, said):
    with pytest.raises(ValueError, match=said):
        Plasticity(**wrong)


def test_the_weights_are_pictured(tmp_path):
    fit(tmp_path, [Plasticity(every=3)])
    assert tmp_path / "figures" / "weights.png" in draw(tmp_path / "metrics.jsonl", tmp_path / "figures")
    with (tmp_path / "figures" / "weights.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    logged = rows(tmp_path, "weight_norm/head")
    assert [int(row["step"]) for row in found] == [3, 6, 9, 12]
    for line, row in zip(found, logged, strict=True):
        assert float(line["weight_norm/head"]) == row["weight_norm/head"]
        assert float(line["effective_lr/embed"]) == row["effective_lr/embed"]
    assert "weight_norm/mean" not in found[0]
