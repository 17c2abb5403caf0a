"""Streams of tasks through run.py: what a run leaves, kill -9 within a task, and what is refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from run import main
from tests.callbacks.test_checkpoint import same
from tests.test_runs import ROOT, door

STREAM = ["data=split_digits", "trainer.threads=1", "logger=none", "trainer.log_every_n_steps=25"]
TINY = [*STREAM, "model=cnn", "model.width=8"]


def words(tmp_path: Path, *more: str) -> list[str]:
    return [*TINY, f"paths.log_dir={tmp_path}", *more]


def finished(*argv: str) -> Path:
    done = door(*argv)
    assert done.returncode == 0, done.stderr
    log_dir = next(word for word in argv if word.startswith("paths.log_dir=")).partition("=")[2]
    return max((path.parent for path in Path(log_dir).rglob("result.json")), key=lambda path: path.stat().st_mtime)


def matrix(run: Path) -> list[list[str]]:
    with (run / "accuracy_matrix.csv").open(newline="") as file:
        return list(csv.reader(file))[1:]


def final(run: Path) -> dict[str, float]:
    return json.loads((run / "result.json").read_text())["metrics"]


def test_a_run_leaves_its_matrix_its_picture_and_its_numbers(tmp_path):
    run = finished(*words(tmp_path, "learner=er"))
    R = matrix(run)
    assert [row[0] for row in R] == list("01234")
    assert all((row[1 + k] == "") == (k > t) for t, row in enumerate(R) for k in range(5))
    assert (run / "figures" / "accuracy_matrix.png").is_file()
    last, metrics = [float(value) for value in R[-1][1:]], final(run)
    assert metrics["continual/final_average_accuracy"] == pytest.approx(sum(last) / 5, abs=1e-6)
    forgotten = [max(float(R[t][1 + k]) for t in range(k, 4)) - last[k] for k in range(4)]
    assert metrics["continual/forgetting_chaudhry"] == pytest.approx(sum(forgotten) / 4, abs=1e-6)
    assert metrics["task_il/final_average_accuracy"] >= metrics["continual/final_average_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["learner=derpp", "continual=adab2n"],
        pytest.param(["learner=ewc", "continual=none"], marks=pytest.mark.slow),
        pytest.param(["learner=rehearsal_free", "continual=nap"], marks=pytest.mark.slow),
        pytest.param(["learner=derpp", "continual=adab2n", "trainer.devices=2"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_to_the_same_matrix(tmp_path, more):
    whole = finished(*words(tmp_path / "whole", *more))
    argv = words(tmp_path / "killed", *more)
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    process = subprocess.Popen([sys.executable, "run.py", *argv], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(
        row[0] == "1" and row[1]
        for path in tmp_path.glob("killed/*/*/accuracy_matrix.csv")
        for row in matrix(path.parent)
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = finished("resume=last", f"paths.log_dir={tmp_path / 'killed'}")
    assert matrix(run) == matrix(whole)
    states = [torch.load(r / "checkpoints" / "last.ckpt", weights_only=True) for r in (whole, run)]
    for part in ("state_dict", "optimizer_states", "global_step", "learner"):
        assert part in states[0]
        assert same(states[0][part], states[1][part])
    scores = [{k: v for k, v in final(r).items() if k.startswith(("continual", "test", "train"))} for r in (whole, run)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["data.tasks=11"], "more than the 10 classes"),
        (["data.tasks=3"], "does not divide the 10 classes"),
        (["data.batch_size=1000"], "more than the"),
        (["norm_layer=layer", "continual=adab2n"], "BatchNorm"),
        (["learner=er", "learner.buffer_size=0"], "learner.buffer_size"),
        (["task=classify"], "continual"),
    ],
)
def test_what_is_refused(tmp_path, capfd, more, says):
    refused(capfd, says, *words(tmp_path, *more))


def refused(capfd, says, *argv):
    try:
        code = main([*argv])
    except SystemExit as left:
        code = left.code
    told = capfd.readouterr().err.strip()
    assert code == 2, told
    assert says in told
    assert len(told.splitlines()) <= 3


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["learner=er", "optimizer=sam"], "remembers each batch"),
        (["trainer.max_epochs=2"], "say data.epochs=2"),
        (["learner=er", "data.mixed=true"], "Try learner=joint"),
        (["task.scenario=domain"], "same classes in every task"),
        (["data=permuted_digits", "task.scenario=class"], "share them"),
    ],
)
@pytest.mark.slow
def test_what_is_refused_before_the_first_step(tmp_path, more, says):
    done = door(*words(tmp_path, *more))
    assert done.returncode == 2, done.stdout + done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


@pytest.mark.slow
def test_a_run_that_was_stopped_within_a_task_and_extended_is_the_unbroken_one(tmp_path):
    whole = finished(*words(tmp_path / "whole", "learner=lwf"))
    finished(*words(tmp_path / "short", "learner=lwf", "trainer.max_steps=10"))
    run = finished("resume=last", f"paths.log_dir={tmp_path / 'short'}", "trainer.max_steps=-1")
    assert matrix(run) == matrix(whole)


@pytest.mark.slow
def test_another_number_of_tasks_is_not_resumed(tmp_path):
    finished(*words(tmp_path, "trainer.max_steps=30"))
    done = door("resume=last", f"paths.log_dir={tmp_path}", "data.tasks=2", "trainer.max_steps=60")
    assert done.returncode == 2
    assert "data.tasks=5" in done.stderr


def test_learner_without_a_stream_is_refused(tmp_path, capfd):
    refused(capfd, "task", "model=mlp", "data=digits", "learner=er", f"paths.log_dir={tmp_path}")
