"""A run that is cut and continued is, bit for bit, the run that was not."""

import math
import os

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint import LastAndBest
from tests.callbacks.toy import Toy, fit, rows
from trainkit.launch.loggers import JsonlLogger


class Stop(Exception):
    """The power fails."""


class Cut(Callback):
    """Raises in the middle of optimizer step number `step`, or in the validation that follows it."""

    def __init__(self, step: int, in_validation: bool = False):
        self.step, self.in_validation = step, in_validation

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step + 1 == self.step and not self.in_validation:
            raise Stop

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == self.step and self.in_validation:
            raise Stop


def load(folder, name="last"):
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def same(a, b):
    """Equality of nested plain values and tensors, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


CASES = {
    "cut between validations": {"cut": 7, "every": None, "resumes_at": 4},
    "cut in a validation": {"cut": 8, "in_validation": True, "every": 2, "resumes_at": 6},
    "cut right after a validation": {"cut": 5, "every": None, "resumes_at": 4},
    "checkpoints between validations": {"cut": 9, "every": 3, "resumes_at": 6},
    "a checkpoint at a validation": {"cut": 10, "every": 2, "resumes_at": 8},
    "accumulation": {"cut": 8, "every": 3, "resumes_at": 6, "accumulate_grad_batches": 2},
    "a checkpoint in a later epoch": {"cut": 9, "every": None, "resumes_at": 8, "length": 5},
    "a checkpoint at the end of an epoch": {"cut": 9, "every": 3, "resumes_at": 6, "length": 3},
    "a validation at the end of an epoch": {"cut": 10, "every": None, "resumes_at": 8, "length": 4},
    "an end in epochs": {"cut": 10, "every": 7, "resumes_at": 7, "length": 5, "max_steps": -1, "max_epochs": 3},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_resume_is_the_unbroken_run(tmp_path, case):
    options = dict(case)
    every, resumes_at = options.pop("every"), options.pop("resumes_at")
    cut = Cut(options.pop("cut"), options.pop("in_validation", False))
    fit(tmp_path / "whole", [LastAndBest(every_n_steps=every)], **options)
    with pytest.raises(Stop):
        fit(tmp_path / "cut", [LastAndBest(every_n_steps=every), cut], **options)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    assert load(tmp_path / "cut")["global_step"] == resumes_at
    logger = JsonlLogger(tmp_path / "cut")
    logger.truncate_after(resumes_at)
    logger.finalize("success")
    fit(tmp_path / "cut", [LastAndBest(every_n_steps=every)], checkpoint=last, **options)

    for name in ("train/loss", "val/loss"):
        assert rows(tmp_path / "cut", name) == rows(tmp_path / "whole", name)
    for name in ("last", "best"):
        a, b = load(tmp_path / "cut", name), load(tmp_path / "whole", name)
        for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
            assert same(a[part], b[part]), (name, part)


def test_a_longer_run_can_be_continued_from_a_finished_one(tmp_path):
    fit(tmp_path / "whole", [LastAndBest()])
    fit(tmp_path / "short", [LastAndBest()], max_steps=6)
    last = tmp_path / "short" / "checkpoints" / "last.ckpt"
    assert load(tmp_path / "short")["global_step"] == 6
    fit(tmp_path / "short", [LastAndBest()], checkpoint=last)
    assert rows(tmp_path / "short", "train/loss")[-1] == rows(tmp_path / "whole", "train/loss")[-1]
    assert same(load(tmp_path / "short")["state_dict"], load(tmp_path / "whole")["state_dict"])


def test_best_is_the_step_with_the_lowest_validation_loss(tmp_path):
    fit(tmp_path, [LastAndBest()], task=Toy(lr=0.3))  # a rate at which the loss goes up again
    losses = {row["step"]: row["val/loss"] for row in rows(tmp_path, "val/loss")}
    best = min(losses, key=losses.__getitem__)
    assert load(tmp_path, "best")["global_step"] == best != 12
    assert load(tmp_path, "last")["global_step"] == 12


def test_the_last_step_is_kept_without_any_validation(tmp_path):
    fit(tmp_path, [LastAndBest()], max_steps=5, limit_val_batches=0)
    assert load(tmp_path)["global_step"] == 5
    assert not (tmp_path / "checkpoints" / "best.ckpt").exists()


@pytest.mark.parametrize("crash_in", ["save", "rename"])
def test_a_crash_while_saving_leaves_the_one_before(tmp_path, monkeypatch, crash_in):
    fit(tmp_path, [LastAndBest()], max_steps=4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert set(before) == {"last.ckpt", "best.ckpt"}

    def fail(*_, **__):
        raise OSError("no space left on device")

    if crash_in == "save":

        def half(self, path, *_, **__):
            path.write_bytes(b"half")
            fail()

        monkeypatch.setattr("lightning.pytorch.Trainer.save_checkpoint", half)
    else:
        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        fit(tmp_path, [LastAndBest()], checkpoint=tmp_path / "checkpoints" / "last.ckpt", max_steps=8)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_a_monitor_that_is_not_validated_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"monitor=val/accuracy is not validated; there are: val/loss"):
        fit(tmp_path, [LastAndBest(monitor="val/accuracy")])


def test_no_number_is_no_best(tmp_path):
    checkpoint = LastAndBest()
    fit(tmp_path, [checkpoint], task=Toy(poison=math.nan, poison_at=6))
    assert load(tmp_path, "best")["global_step"] == 4
    assert load(tmp_path, "last")["global_step"] == 12


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint\.mode"):
        LastAndBest(mode="lowest")
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint\.every_n_steps"):
        LastAndBest(every_n_steps=0)
