"""guard=skip leaves a bad step out entirely; train/loss_spike says how far a loss stands out."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint import LastAndBest
from callbacks.guard import Guard, NonFiniteLoss, finite_gradients, spike, spike_without_waiting
from callbacks.preemption import Preemption
from tests.callbacks.test_checkpoint import load, same
from tests.callbacks.toy import Network, Toy, fit, rows
from trainkit.norm_layer.batch import BatchNorm
from trainkit.optimizer.lion import Lion


class Bad(Toy):
    """The loss of each step in `at` is `poison`, in its micro-batch number `micro`."""

    def __init__(self, *at, poison=math.nan, micro=0, **changed):
        super().__init__(**changed)
        self.at, self.bad, self.micro, self.place = at, poison, micro, 0

    def before_micro_batch(self, place):
        self.place = place
        super().before_micro_batch(place)

    def loss(self, model, batch):
        loss = super().loss(model, batch)
        return loss * self.bad if model.training and self.step in self.at and self.place == self.micro else loss


class Watch(Callback):
    """Copies weights and optimizer state after every step."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = {"weights": pl_module.state_dict(), "optimizer": trainer.optimizers[0].state_dict()["state"]}
        self.seen[trainer.global_step] = torch.utils._pytree.tree_map(
            lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state
        )


OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, lr=0.01), "lion": partial(Lion, lr=0.001)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_step_changes_nothing(tmp_path, said, optimizer, poison, accumulation):
    watch = Watch()
    task = Bad(5, 6, 9, poison=poison, micro=accumulation - 1, optimizer=OPTIMIZERS[optimizer])
    options = {"log_every_n_steps": 1, "accumulate_grad_batches": accumulation}
    fit(tmp_path, [Guard("skip"), watch], task=task, **options)
    for step in range(2, 13):
        assert same(watch.seen[step], watch.seen[step - 1]) == (step in (5, 6, 9)), step
    assert [row["train/skipped_steps"] for row in rows(tmp_path, "train/skipped_steps")] == [0] * 4 + [1, 2, 2, 2] + [
        3
    ] * 4
    assert [line[:18] for line in said if "skipped" in line] == ["step 5 is skipped:", "step 9 is skipped:"]
    assert all(p.isfinite().all() for p in task.parameters())


def test_a_bad_gradient_of_a_good_loss_is_skipped_too(tmp_path):
    class Slope(Toy):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            return loss + (model.head.weight * 0).sum().sqrt() if self.step == 5 else loss

    watch = Watch()
    fit(tmp_path, [Guard("skip"), watch], task=Slope())
    assert same(watch.seen[5], watch.seen[4])
    assert not same(watch.seen[6], watch.seen[5])


def test_so_many_in_a_row_stop_it(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"3 steps in a row were skipped, the last one 8, where the loss is nan"):
        fit(tmp_path, [Guard("skip", max_skips=3)], task=Bad(2, 3, 6, 7, 8))


@pytest.mark.parametrize("count", ["step", "call"])
def test_the_statistics_of_norm_layers_are_not_poisoned(tmp_path, count):
    class Normed(Network):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(4, count=count)

        def forward(self, x):
            return super().forward(self.norm(x if not (self.training and task.step == 3) else x * math.nan))

    task = Toy()
    task.model = Normed()
    watch = Watch()
    fit(tmp_path, [Guard("skip"), watch], task=task)
    assert all(b.isfinite().all() for b in task.model.buffers())
    assert same(watch.seen[3], watch.seen[2])
    assert not same(
        watch.seen[4]["weights"]["model.norm.running_mean"], watch.seen[3]["weights"]["model.norm.running_mean"]
    )


def test_resume_counts_on(tmp_path):
    def callbacks():
        return [Guard("skip"), LastAndBest(every_n_steps=1), Preemption()]

    bad = (3, 6, 7, 14)
    options = {"max_steps": 30, "log_every_n_steps": 1}
    fit(tmp_path / "whole", callbacks(), task=Bad(*bad), **options)
    for until in (6, 14, 20, 30):
        last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
        fit(
            tmp_path / "cut",
            callbacks(),
            task=Bad(*bad),
            checkpoint=last if last.exists() else None,
            **options | {"max_steps": until, "limit_val_batches": 0},
        )
    for name in ("train/skipped_steps", "train/loss_spike"):
        a, b = ([(row["step"], row[name]) for row in rows(tmp_path / x, name)] for x in ("whole", "cut"))
        assert str(a) == str(b)
    assert same(load(tmp_path / "whole")["state_dict"], load(tmp_path / "cut")["state_dict"])


def test_the_score_is_the_formula(tmp_path):
    fit(tmp_path, [Guard(window=15)], max_steps=40, log_every_n_steps=1)
    losses = [row["train/loss"] for row in rows(tmp_path)]
    found = {row["step"]: row["train/loss_spike"] for row in rows(tmp_path, "train/loss_spike")}
    assert list(found) == list(range(11, 41))
    for step, score in found.items():
        before = torch.tensor(losses[max(0, step - 16) : step - 1], dtype=torch.float64)
        expected = (losses[step - 1] - before.mean()) / before.std()
        assert score == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


def test_a_spike_stands_out_and_what_is_no_number_does_not_blind_the_score(tmp_path):
    fit(tmp_path, [Guard("skip")], task=Bad(20, poison=math.nan), max_steps=40, log_every_n_steps=1)
    scores = {row["step"]: row["train/loss_spike"] for row in rows(tmp_path, "train/loss_spike")}
    assert math.isnan(scores[20])
    assert all(math.isfinite(score) for step, score in scores.items() if step != 20)
    fit(tmp_path / "high", [Guard()], task=Bad(30, poison=50.0), max_steps=32, log_every_n_steps=1)
    scores = {row["step"]: row["train/loss_spike"] for row in rows(tmp_path / "high", "train/loss_spike")}
    assert scores[30] > 10 > max(score for step, score in scores.items() if step != 30)


def test_equal_losses_have_no_spike():
    assert spike(torch.tensor(2.0), torch.full((12,), 2.0)) == 0
    assert spike(torch.tensor(3.0), torch.tensor([1.0, 3.0, math.nan, math.inf])) == pytest.approx(1 / math.sqrt(2))


def test_the_largest_entry_tells():
    task = Toy()
    for value, finite in ((1e38, True), (math.inf, False), (math.nan, False), (-math.inf, False)):
        for p in task.model.parameters():
            p.grad = torch.ones_like(p)
        next(task.model.parameters()).grad[0, 0] = value
        assert bool(finite_gradients(list(task.model.parameters()))) == finite


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"callbacks\.guard\.max_skips"):
        Guard(max_skips=0)
    with pytest.raises(ValueError, match=r"callbacks\.guard\.window"):
        Guard(window=3)


@pytest.mark.parametrize("count", [0, 1, 2, 40])
def test_the_score_on_a_device_is_that_on_the_cpu(count):
    before = torch.full((60,), math.nan)
    before[:count] = torch.randn(count)
    before[50], before[51] = math.inf, -math.inf
    for loss in (torch.tensor(3.0), torch.tensor(math.inf)):
        torch.testing.assert_close(spike_without_waiting(loss, before), spike(loss, before))
