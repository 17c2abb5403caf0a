"""A loss that is no number stops the run before it reaches the weights or a checkpoint."""

import math

import pytest
import torch
from torch import nn

from callbacks.checkpoint import LastAndBest
from callbacks.guard import Guard, NonFiniteLoss
from tests.callbacks.toy import Toy, fit, rows


@pytest.mark.parametrize(("poison", "named"), [(math.nan, "nan"), (math.inf, "inf")])
@pytest.mark.parametrize("step", [1, 7])
def test_the_first_bad_step_is_named_before_the_weights_change(tmp_path, poison, named, step):
    task = Toy(poison=poison, poison_at=step)
    with pytest.raises(
        NonFiniteLoss, match=rf"the loss is {named} at step {step}; the first layer .* is embed\.weight"
    ):
        fit(tmp_path, [Guard()], task=task)
    assert all(p.isfinite().all() for p in task.parameters())


def test_a_gradient_that_is_no_number_counts_though_the_loss_is_one(tmp_path):
    class Broken(Toy):
        def loss(self, model, batch):
            loss = super().loss(model, batch)
            if self.step == 5:
                weight = model.blocks[1].attn.f.weight
                loss = loss + (weight * 0).sum().sqrt()  # 0 with an infinite slope
            return loss

    with pytest.raises(
        NonFiniteLoss, match=r"the loss is \d.* at step 5; the first layer .* is blocks\.1\.attn\.f\.weight"
    ):
        fit(tmp_path, [Guard()], task=Broken())


def test_a_bad_loss_without_a_bad_gradient_says_so(tmp_path):
    class Harmless(Toy):
        def loss(self, model, batch):
            return super().loss(model, batch) + (math.inf if self.step == 3 else 0.0)

    with pytest.raises(NonFiniteLoss, match="the loss is inf at step 3; no gradient is non-finite at step 3"):
        fit(tmp_path, [Guard()], task=Harmless())


class Spoils(nn.Module):
    """Hands on NaN in the training pass of step 5."""

    def __init__(self, task):
        super().__init__()
        self.task = [task]  # in a list, so that it is no submodule

    def forward(self, x):
        return x * math.nan if self.task[0].step == 5 and self.training else x


def spoiled():
    task = Toy()
    task.model.blocks[1].mlp.f.append(Spoils(task))
    return task


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_first_output_that_is_no_number_is_named(tmp_path, accumulate):
    with pytest.raises(
        NonFiniteLoss,
        match=r"nan at step 5; first non-finite value: output of blocks\.1\.mlp\.f\.2; the first layer with",
    ):
        fit(tmp_path, [Guard()], task=spoiled(), accumulate_grad_batches=accumulate)


def test_it_is_named_where_the_step_is_skipped_and_not_at_a_later_one(tmp_path, said):
    task = spoiled()
    fit(tmp_path, [Guard(on_non_finite="skip")], task=task)
    (line,) = said
    assert line.startswith("step 5 is skipped: the loss is nan; first non-finite value: output of blocks.1.mlp.f.2; ")
    assert all(p.isfinite().all() for p in task.parameters())
    assert not any(module._forward_hooks for module in task.modules())


def test_a_batch_or_a_weight_that_is_no_number_is_named_as_such(tmp_path):
    class Torn(Toy):
        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch, batch_idx)
            if self.step == 3:
                batch[0, 0] = math.inf

    with pytest.raises(NonFiniteLoss, match="first non-finite value: in the batch; "):
        fit(tmp_path, [Guard()], task=Torn())
    task = Toy()
    with torch.no_grad():
        task.model.head.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteLoss, match=r"at step 1; first non-finite value: parameter head\.weight; "):
        fit(tmp_path, [Guard()], task=task)


def test_large_but_finite_gradients_are_let_through(tmp_path):
    class Large(Toy):
        def loss(self, model, batch):
            return super().loss(model, batch) * 1e25  # the squares of such gradients are beyond float32

    fit(tmp_path, [Guard()], task=Large())
    assert rows(tmp_path)[-1]["step"] == 12


def test_warn_says_it_once_and_goes_on(tmp_path, said):
    fit(tmp_path, [Guard(on_non_finite="warn")], task=Toy(poison=math.nan, poison_at=5))
    assert [line[:27] for line in said] == ["the loss is nan at step 5; "]
    assert math.isnan(rows(tmp_path)[-1]["train/loss"])


class OnADevice(Guard):
    """The guard as it behaves where every look at a number would wait for the device."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass


def test_on_a_device_the_losses_are_looked_at_when_they_are_logged(tmp_path):
    with pytest.raises(
        NonFiniteLoss, match=r"the loss is nan at step 5; the first layer .* at step 6 is embed\.weight"
    ):
        fit(tmp_path, [OnADevice()], task=Toy(poison=math.nan, poison_at=5), val_check_interval=100)


def test_on_a_device_a_bad_loss_does_not_reach_a_checkpoint(tmp_path):
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 5"):
        fit(
            tmp_path,
            [OnADevice(), LastAndBest(every_n_steps=3)],
            task=Toy(poison=math.nan, poison_at=5),
            log_every_n_steps=50,
            val_check_interval=100,
        )
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 3
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


def test_on_a_device_nothing_waits_for_it_between_logged_steps(tmp_path, monkeypatch):
    looks = []
    original = Guard._look
    monkeypatch.setattr(Guard, "_look", lambda self, *a, **k: (looks.append(1), original(self, *a, **k)))
    fit(tmp_path, [OnADevice()], val_check_interval=100, log_every_n_steps=4)
    assert len(looks) == 1  # before the validation after the last step


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"callbacks\.guard\.on_non_finite"):
        Guard(on_non_finite="ignore")


class NewTaskAtFive(Toy):
    """Tells the model of a new task before its first step, as a stream does."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 4:
            self.model.task.fill_(1)
        super().on_train_batch_start(batch, batch_idx)


def test_a_skipped_step_does_not_undo_that_a_task_began(tmp_path):
    task = NewTaskAtFive(poison=math.nan, poison_at=5)
    task.model.register_buffer("task", torch.tensor(0))
    fit(tmp_path, [Guard(on_non_finite="skip")], task=task)
    assert task.model.task == 1
