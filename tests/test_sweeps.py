"""Sweeps of real runs through the user's door. What needs no training is in tests/launch/test_sweep.py."""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.test_runs import SMALL, corpus, door, losses, words  # noqa: F401  # corpus and words are fixtures
from trainkit.report.metrics_file import readable

ROOT = Path(__file__).parents[1]


def alive(mark: str) -> list[str]:
    """The command lines of processes that mention `mark`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if mark in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def until(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def start(*argv: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "run.py", "-m", *argv], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def jobs(tmp_path: Path) -> list[dict]:
    (sweep,) = (tmp_path / "logs").rglob("sweep.json")
    return json.loads(sweep.read_text())["jobs"]


def test_a_mistake_in_a_later_job_is_found_before_the_first_starts(words, tmp_path):  # noqa: F811
    done = door("-m", "model.heads=2,3", *[word for word in words if not word.startswith("model.heads")])
    assert done.returncode == 2
    assert done.stderr == "model.width must be a multiple of model.heads; 16 is no multiple of 3. Try model.width=15\n"
    assert done.stdout == ""
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed process cannot take its children with it")
def test_a_sweep_that_is_killed_leaves_nothing_running_and_goes_on_to_the_same_bits(words, tmp_path):  # noqa: F811
    two = ["norm=pre,peri", "sweep.jobs=2", *words, "trainer.max_steps=300", "trainer.val_check_interval=10"]
    whole = door("-m", *two, f"paths.log_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    parent = start(*two)
    until(lambda: list((tmp_path / "logs").rglob("last.ckpt")))
    parent.kill()
    parent.wait()
    until(lambda: not alive(str(tmp_path / "logs")), 5)
    assert any(job["status"] == "running" for job in jobs(tmp_path))
    done = door("-m", "sweep.resume=last", f"paths.log_dir={tmp_path / 'logs'}")
    assert done.returncode == 0, done.stderr
    for number in "01":
        (unbroken,) = (tmp_path / "whole").rglob(f"*/{number}")
        (broken,) = (tmp_path / "logs").rglob(f"*/{number}")
        assert losses(broken) == losses(unbroken)
        assert all(torch.equal(value, weights(broken)[name]) for name, value in weights(unbroken).items())


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_ctrl_c_ends_a_sweep_with_all_its_ranks(words, tmp_path, devices):  # noqa: F811
    ranks = ["trainer=ddp", "trainer.accelerator=cpu"] if devices > 1 else []
    parent = start("norm=pre,peri", *ranks, *words, f"trainer.devices={devices}", "trainer.max_steps=100000")
    until(lambda: [f for f in (tmp_path / "logs").rglob("metrics.jsonl") if len(readable(f)) > 2])
    parent.send_signal(signal.SIGINT)
    told = parent.communicate(timeout=60)[0]
    assert parent.returncode == 130, told
    until(lambda: not alive(str(tmp_path / "logs")), 10)
    assert [job["status"] for job in jobs(tmp_path)] == ["interrupted", "waiting"]
    assert "python run.py -m sweep.resume=" in told
    result = json.loads(next((tmp_path / "logs").rglob("0/result.json")).read_text())
    assert result["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed process cannot take its children with it")
def test_a_killed_sweep_takes_all_ranks_with_it(words, tmp_path):  # noqa: F811
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    parent = start("norm=pre,peri", *ranks, *words, "trainer.max_steps=100000")
    until(lambda: [f for f in (tmp_path / "logs").rglob("metrics.jsonl") if len(readable(f)) > 2])
    assert len(alive(str(tmp_path / "logs"))) == 3
    parent.kill()
    parent.wait()
    until(lambda: not alive(str(tmp_path / "logs")), 10)


@pytest.mark.slow
def test_evaluations_of_several_runs_stand_side_by_side(words, tmp_path):  # noqa: F811
    assert door("-m", "seed=0,1", *words).returncode == 0
    (sweep,) = (tmp_path / "logs").rglob("sweep.json")
    runs = ",".join(str(sweep.parent / number) for number in "01")
    done = door("-m", "mode=eval", f"resume={runs}", f"paths.log_dir={tmp_path / 'evals'}")
    assert done.returncode == 0, done.stderr
    trained, (evaluated,) = jobs(tmp_path), (tmp_path / "evals").rglob("sweep.json")
    for before, after in zip(trained, json.loads(evaluated.read_text())["jobs"], strict=True):
        assert after["metrics"]["test/loss"] == pytest.approx(before["metrics"]["test/loss"], rel=1e-6)
        assert not (Path(before["dir"]) / "eval").exists()


@pytest.mark.slow
def test_a_sweep_over_learning_rates_and_a_search_through_the_door(words, tmp_path):  # noqa: F811
    # Without clipping and with steps of any size the loss at the largest rate is no number soon.
    wild = ["optimizer=sgd", "gradient=none", "trainer.max_steps=4", "schedule=constant", "~callbacks.figures"]
    done = door("-m", "hparams_search=lr_sensitivity", "hparams_search.lr=[0.5,1e20]", *words, *wild)
    assert done.returncode == 0, done.stderr
    assert [job["status"] for job in jobs(tmp_path)] == ["finished", "diverged"]
    (sweep,) = (tmp_path / "logs").rglob("lr_sensitivity.md")
    loss = jobs(tmp_path)[0]["metrics"]["val/loss"]
    assert f"| all jobs | 0.5 | {loss:.4f} |  | 1 of 2 | 0 | {(math.log(256) - loss) / 2:.4f} |" in sweep.read_text()
    assert f"| all jobs | {loss:.4f} | 5.5452 ×1 |" in sweep.read_text()

    space = "hparams_search.space={norm:[pre,peri]}"
    search = ["mode=search", "hparams_search=optuna", "hparams_search.trials=2", space, "name=search"]
    done = door(*search, *words, "trainer.max_steps=2", "callbacks=none", "sweep.jobs=2")
    assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "logs" / "search").rglob("sweep.json")
    metrics = [job["metrics"]["val/loss"] for job in json.loads(found.read_text())["jobs"]]
    best = json.loads(found.read_text())["jobs"][metrics.index(min(metrics))]["overrides"]
    assert f"python run.py {shlex.join(best)}" in done.stdout
