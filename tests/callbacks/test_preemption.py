"""SIGTERM and SIGUSR1: saved at the end of the step by all ranks, and the run goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

import trainkit
from callbacks.checkpoint import LastAndBest
from callbacks.preemption import Preemption
from tests.callbacks.test_checkpoint import load, same
from tests.callbacks.toy import fit, rows
from tests.test_runs import ROOT, SMALL, corpus, losses, words  # noqa: F401  # fixtures
from trainkit.launch.loggers import JsonlLogger
from trainkit.launch.process.interruption import Interrupted, requeue
from trainkit.report.metrics_file import readable

CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138}


class Told(Callback):
    """Sends a signal to this process in the middle of a step, or in the validation after it."""

    def __init__(self, step, number=signal.SIGTERM, *, hook="on_before_backward", times=1):
        self.step, self.number, self.hook, self.left = step, number, hook, times

    def on_before_backward(self, trainer, *_):
        if self.hook == "on_before_backward" and trainer.global_step + 1 == self.step:
            self._send()

    def on_validation_start(self, trainer, *_):
        if self.hook == "on_validation_start" and trainer.global_step == self.step:
            self._send()

    def on_test_start(self, trainer, *_):
        if self.hook == "on_test_start":
            self._send()

    def _send(self):
        if self.left:
            self.left -= 1
            os.kill(os.getpid(), self.number)


CASES = {
    "between validations": (7, {}, 7),
    "before a validation": (8, {}, 8),
    "in a validation": (4, {"hook": "on_validation_start"}, 4),
    "with accumulation": (6, {"accumulate_grad_batches": 3}, 6),
    "at the end of an epoch": (5, {"length": 5}, 5),
    "in the first step": (1, {"number": signal.SIGUSR1}, 1),
}


@pytest.mark.parametrize(("step", "options", "saved"), CASES.values(), ids=CASES)
def test_the_step_is_finished_and_the_rest_is_the_unbroken_run(tmp_path, step, options, saved):
    options = dict(options)
    told = Told(step, options.pop("number", signal.SIGTERM), hook=options.pop("hook", "on_before_backward"))
    before = [signal.getsignal(number) for number in CODES]
    fit(tmp_path / "whole", [Preemption(), LastAndBest()], **options)
    with pytest.raises(Interrupted, match=f"after step {saved}, which is saved") as stopped:
        fit(tmp_path / "cut", [LastAndBest(), told, Preemption()], **options)
    assert stopped.value.code == CODES[told.number]
    assert load(tmp_path / "cut")["global_step"] == saved
    assert [signal.getsignal(number) for number in CODES] == before
    logger = JsonlLogger(tmp_path / "cut")
    logger.truncate_after(saved)
    logger.finalize("success")
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "cut", [Preemption(), LastAndBest()], checkpoint=last, **options)
    for name in ("train/loss", "val/loss"):
        assert rows(tmp_path / "cut", name) == rows(tmp_path / "whole", name)
    a, b = load(tmp_path / "cut"), load(tmp_path / "whole")
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        assert same(a[part], b[part]), part


def test_without_a_signal_nothing_is_different(tmp_path):
    fit(tmp_path / "with", [Preemption(), LastAndBest()])
    fit(tmp_path / "without", [LastAndBest()])
    assert rows(tmp_path / "with") == rows(tmp_path / "without")


def test_lightnings_own_handlers_are_off(tmp_path):
    class Look(Callback):
        def on_train_batch_start(self, trainer, *_):
            handlers.update(signal.getsignal(number).__qualname__ for number in CODES)
            assert not trainer.received_sigterm

    handlers = set()
    fit(tmp_path, [Preemption(), Look()], max_steps=1, limit_val_batches=0)
    assert handlers == {"Preemption._told"}


@pytest.mark.slow
def test_two_at_once_are_one_and_a_later_one_ends_it(tmp_path):
    with pytest.raises(Interrupted, match="after step 3, which is saved"):
        fit(tmp_path, [LastAndBest(), Told(3, times=1), Told(3, times=1), Preemption()])
    script = """
import os, signal, sys, time
from pathlib import Path
from callbacks.preemption import Preemption, SAME
p = Preemption(); p._training = True
p._told(signal.SIGUSR1, None)
p._told(signal.SIGTERM, None)
time.sleep(SAME + 0.1)
print("alive", flush=True)
p._told(signal.SIGTERM, None)
print("too long")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == "alive\n"


def test_a_run_says_so_and_goes_on(words, tmp_path, monkeypatch):  # noqa: F811
    words = [*words, "model.dropout=0.1"]
    whole = trainkit.run([*words, f"paths.log_dir={tmp_path / 'whole'}"]).dir
    original = Preemption.on_train_batch_end

    def told(self, trainer, *args):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self, trainer, *args)

    monkeypatch.setattr(Preemption, "on_train_batch_end", told)
    with pytest.raises(SystemExit) as stopped:
        trainkit.run(words)
    assert stopped.value.code == 138
    monkeypatch.undo()
    (run,) = (path.parent for path in (tmp_path / "logs").rglob("result.json"))
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "interrupted"
    assert result["reason"] == "SIGUSR1 stopped it after step 3, which is saved"
    assert "Traceback" not in (run / "run.log").read_text()
    trainkit.run([f"resume={run}"])
    assert losses(run) == losses(whole)
    a, b = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (run, whole))
    assert same(a["state_dict"], b["state_dict"])
    assert same(a["optimizer_states"], b["optimizer_states"])


# --- SLURM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A scontrol that notes what it is asked; the function returns that."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "asked"}\nexit ${{FAILS:-0}}\n')
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    return lambda: (tmp_path / "asked").read_text().split("\n")[:-1] if (tmp_path / "asked").exists() else []


def test_the_job_is_requeued_after_sigusr1_on_slurm_only(scontrol, monkeypatch, said):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue(Interrupted(signal.SIGUSR1, "x"))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    requeue(Interrupted(signal.SIGTERM, "x"))
    assert scontrol() == []
    requeue(Interrupted(signal.SIGUSR1, "x"))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    requeue(Interrupted(signal.SIGUSR1, "x"))
    assert scontrol() == ["requeue 17", "requeue 12_5"]
    monkeypatch.setenv("FAILS", "1")
    requeue(Interrupted(signal.SIGUSR1, "x"))
    assert said[-1] == "warning: scontrol requeue 12_5 failed (exit code 1); submit the job again with resume=last"
    monkeypatch.setenv("PATH", "/nowhere")
    requeue(Interrupted(signal.SIGUSR1, "x"))
    assert "No such file" in said[-1]


# --- through the user's door -----------------------------------------------------------------------------------------


def _start(*argv, **environment):
    env = os.environ | {"SLURM_JOB_ID": "", **environment}
    env = {name: value for name, value in env.items() if value}
    return subprocess.Popen([sys.executable, "run.py", *argv], cwd=ROOT, env=env, stdout=-1, stderr=-1, text=True)


def _ranks(mark):
    """The processes that mention `mark`, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, environ = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in line and b"run.py" in line:
            ranks = [word for word in environ.split(b"\0") if word.startswith(b"LOCAL_RANK=")]
            found[int(ranks[0].split(b"=")[1]) if ranks else 0] = int(path.name)
    return found


def _until(condition, seconds=90.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_all_ranks_stop_together_whichever_is_told(words, tmp_path, scontrol, rank, number):  # noqa: F811
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "model.dropout=0.1"]
    ddp += ["schedule=constant", "schedule.warmup=5"]  # a fraction would be of another length
    logs = tmp_path / "logs"
    run = _start(*words, *ddp, "trainer.max_steps=100000", SLURM_JOB_ID="17", SLURM_JOB_NAME="interactive")
    _until(lambda: [f for f in logs.rglob("metrics.jsonl") if len(readable(f)) > 3])
    os.kill(_ranks(str(logs))[rank], number)
    told = run.communicate(timeout=60)
    assert run.returncode == 128 + number, told
    _until(lambda: not _ranks(str(logs)), 10)
    (directory,) = (path.parent for path in logs.rglob("result.json"))
    result = json.loads((directory / "result.json").read_text())
    step = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert result["status"] == "interrupted"
    assert result["reason"] == f"{signal.Signals(number).name} stopped it after step {step}, which is saved"
    assert scontrol() == (["requeue 17"] if number == signal.SIGUSR1 else [])
    total = step + 6
    for words_ in ([f"resume={directory}"], [*words, *ddp, f"paths.log_dir={tmp_path / 'whole'}"]):
        done = _start(*words_, f"trainer.max_steps={total}")
        told = done.communicate(timeout=90)
        assert done.returncode == 0, told
    (whole,) = (path.parent for path in (tmp_path / "whole").rglob("result.json"))
    a, b = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (directory, whole))
    assert same(a["state_dict"], b["state_dict"])
    assert same(a["optimizer_states"], b["optimizer_states"])
    # The first run took every further step for one in the middle, and the last of the whole one is logged anyway.
    kept = dict(losses(directory))
    assert all(kept[step] == loss for step, loss in losses(whole))
