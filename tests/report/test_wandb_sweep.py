"""A sweep for W&B's agents, and the command that an agent makes of it."""

import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml

from tests.test_runs import ROOT, corpus, words  # noqa: F401  # corpus and words are fixtures
from trainkit.launch.preflight import check
from trainkit.report.__main__ import main

SWEPT = ["norm=pre,peri", "optimizer.lr=1e-4,1e-3", "optimizer.betas=[0.9,0.95],[0.8,0.9]", "data.val_batches=1,2"]


@pytest.fixture
def made(tmp_path, capsys):
    """The file that words make."""

    def make(*argv: str) -> dict:
        assert main(["wandb_sweep", *argv, f"paths.log_dir={tmp_path}"]) == 0
        path, command = capsys.readouterr().out.splitlines()
        assert command == f"wandb sweep {path}"
        return yaml.safe_load(Path(path).read_text())

    return make


def agents(sweep: dict, values: dict) -> list[str]:
    """The command line of one draw, made by W&B's own code as its agent does it."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    macros = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    macros |= {"env": ["/usr/bin/env"], "interpreter": [sys.executable], "program": [sweep["program"]]}
    command = utils.create_sweep_command(list(sweep["command"]))
    return [word for part in command for word in (macros[part[2:-1]] if part.startswith("${") else [part])]


@pytest.mark.slow
def test_the_file_is_a_sweep_and_its_draws_are_the_jobs_of_the_same_words(made, tmp_path):
    sweep = made(*SWEPT, "seed=3")
    assert sweep["program"] == "run.py"
    assert sweep["method"] == "grid"
    assert sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    assert sweep["parameters"]["optimizer.lr"] == {"values": [1e-4, 1e-3]}
    assert sweep["parameters"]["data.val_batches"] == {"values": [1, 2]}
    assert sweep["parameters"]["norm"] == {"values": ["pre", "peri"]}
    names = list(sweep["parameters"])
    draws = product(*(sweep["parameters"][name]["values"] for name in names))
    asked = [agents(sweep, dict(zip(names, draw, strict=True))) for draw in draws]
    assert all(command[:3] == ["/usr/bin/env", sys.executable, "run.py"] for command in asked)
    jobs = [check(command[3:]).configs[0] for command in asked]
    assert jobs == check(["-m", *SWEPT, "seed=3", f"paths.log_dir={tmp_path}"]).configs


def test_the_goal_is_that_of_the_best_checkpoint(made):
    sweep = made("norm=pre,peri", "callbacks.checkpoint.monitor=val/bits", "callbacks.checkpoint.mode=max")
    assert sweep["metric"] == {"name": "val/bits", "goal": "maximize"}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nrm=pre,peri"], "nrm=pre: there is no key 'nrm'; did you mean 'norm'?"),
        (["norm=pre,perry"], "norm=perry: norm has no option 'perry'"),
        (["norm=pre"], "nothing varies"),
        (["norm=pre,peri", "logger=none"], "logger=none: W&B learns the results of a sweep by logger=wandb"),
        (["norm=pre,peri", "logger=wandb,none"], "logger=none: W&B learns"),
        (["norm=pre,peri", "sweep.jobs=2"], "sweep.jobs=2 is about a sweep that run.py looks after"),
        (["norm=pre,peri", "paths.run_dir=x"], "paths.run_dir=x is about a sweep that run.py"),
        (["norm=pre,peri", "callbacks=none"], "a sweep has a metric"),
        (["norm=pre,peri", "--cfg", "job"], "takes no flags"),
    ],
)
def test_a_mistake_is_told_as_by_run_py(argv, says, tmp_path, capsys):
    assert main(["wandb_sweep", *argv, f"paths.log_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err.strip()
    assert says in told
    assert len(told.splitlines()) <= 3
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_of_an_agent_runs_as_the_agents_run(words, made, tmp_path):  # noqa: F811
    given = [word for word in words if not word.startswith(("paths.log_dir", "logger"))]
    sweep = made("norm=pre,peri", *given)
    command = agents(sweep, {"norm": "peri"})
    env = {"WANDB_MODE": "offline", "WANDB_SWEEP_ID": "abc", "WANDB_RUN_ID": "given123", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*-given123"))
