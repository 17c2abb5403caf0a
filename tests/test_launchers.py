"""The same sweep through Hydra launchers, each on this machine alone."""

import csv
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_runs import ROOT, corpus, door, losses, words  # noqa: F401  # corpus and words are fixtures
from tests.test_sweeps import alive, start, until
from trainkit.launch.check.choices import LAUNCHERS
from trainkit.launch.preflight import UserError, check


def installed(launcher: str) -> bool:
    extra = LAUNCHERS[launcher]
    try:
        return find_spec(f"hydra_plugins.hydra_{'submitit' if extra == 'slurm' else extra}_launcher") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_is_missing_is_told_how_to_get(launcher):
    if installed(launcher):
        pytest.skip(f"{launcher} is installed")
    with pytest.raises(UserError) as caught:
        check(["-m", f"hydra/launcher={launcher}", "norm=pre,peri"])
    extra = LAUNCHERS[launcher]
    assert str(caught.value) == f"hydra/launcher={launcher} is not installed\npip install 'trainkit[{extra}]'"


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The sweep without a launcher, made once."""
    found: dict[str, Path] = {}

    def sweep(given: list[str]) -> Path:
        if "sweep" not in found:
            found["sweep"] = run(tmp_path_factory.mktemp("ours"), given)
        return found["sweep"]

    return sweep


def run(folder: Path, given: list[str], *more: str, code: int = 0) -> Path:
    """The directory of a sweep over two placements."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "run.py", "-m", "norm=pre,peri", *given, *more, f"paths.run_dir={folder / 'sweep'}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    return folder / "sweep"


def rows(sweep: Path) -> list[dict]:
    """summary.csv without what differs between two starts of the same thing."""
    with (sweep / "summary.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "dir")} for row in csv.DictReader(file)]


def record(sweep: Path) -> list[dict]:
    return json.loads((sweep / "sweep.json").read_text())["jobs"]


def final(job: dict) -> dict:
    return {name: value for name, value in job["metrics"].items() if not name.endswith("_per_second")}


def keys(job: dict) -> list[str]:
    return [word.partition("=")[0] for word in job["overrides"]]


LOCAL = [
    pytest.param(name, marks=pytest.mark.skipif(not installed(name), reason=f"pip install 'trainkit[{extra}]'"))
    for name, extra in LAUNCHERS.items()
    if name != "submitit_slurm"
]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LOCAL)
def test_a_launcher_gives_the_same_sweep_to_the_last_bit(launcher, ours, words, tmp_path):  # noqa: F811
    given = [*words, "trainer.max_steps=20"]
    plain, other = ours(given), run(tmp_path, given, f"hydra/launcher={launcher}")
    assert rows(other) == rows(plain)
    for mine, theirs in zip(record(plain), record(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["status"] == theirs["status"] == "finished"
        assert final(theirs) == final(mine)
        assert "val/loss" in final(mine)
        assert losses(Path(theirs["dir"])) == losses(Path(mine["dir"]))
        assert keys(theirs) == keys(mine)
    assert {path.name for path in plain.iterdir()} == {path.name for path in other.iterdir()} - {".launcher"}


@pytest.mark.slow
@pytest.mark.skipif(not installed("joblib"), reason="pip install 'trainkit[joblib]'")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130)])
def test_jobs_of_joblib_end_with_their_sweep_and_can_be_gone_on_with(words, tmp_path, number, code):  # noqa: F811
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    long = ["trainer.max_steps=1000000", "trainer.val_check_interval=20", f"paths.run_dir={tmp_path / 'sweep'}"]
    parent = start("norm=pre,peri", *joblib, *words, *long)
    until(lambda: len(list(tmp_path.rglob("last.ckpt"))) == 2)
    parent.send_signal(number)
    told = parent.communicate(timeout=60)[0]
    assert parent.returncode == code, told
    until(lambda: not alive(f"paths.run_dir={tmp_path / 'sweep'}"), 40)
    done = door("-m", f"sweep.resume={tmp_path / 'sweep'}")
    assert done.returncode == 2
    assert "was started with hydra/launcher=joblib hydra.launcher.n_jobs=2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LOCAL)
def test_a_job_that_fails_is_noted_and_can_be_gone_on_with(launcher, words, tmp_path):  # noqa: F811
    bad = ["optimizer=sgd", "optimizer.lr=1e30", "gradient=none", "trainer.max_steps=20"]
    sweep = run(tmp_path, [*words, *bad], f"hydra/launcher={launcher}", code=1)
    assert [job["status"] for job in record(sweep)] == ["failed", "failed"]
    assert all("NonFiniteLoss" in job["reason"] for job in record(sweep))
