"""Several processes through the user's door."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_runs import ROOT, SMALL, door, losses
from tests.test_sweeps import alive, until, weights

pytestmark = pytest.mark.slow
DDP = ["trainer=ddp", "trainer.accelerator=cpu"]
PLUGINS = "plugins=[tests]"
WITNESS = [PLUGINS, "+callbacks.witness._target_=tests.launch.witness.Witness"]
STEPS = 20


@pytest.fixture
def words(tmp_path):
    """A corpus without repetition, so that a window is known by its letters."""
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=1800)
    (tmp_path / "corpus.txt").write_text("".join(letters))
    folders = [f"paths.log_dir={tmp_path / 'logs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    return [*SMALL, "data=text", f"data.path={tmp_path / 'corpus.txt'}", f"trainer.max_steps={STEPS}", *folders]


def seen(run: Path) -> list[dict]:
    """What the processes of a run have noted, by rank."""
    return [json.loads((run / f"seen_{rank}.json").read_text()) for rank in range(len(list(run.glob("seen_*.json"))))]


def steps(run: Path) -> list[list[tuple]]:
    """The windows of each optimizer step, over all ranks."""
    parts = [rank["windows"] for rank in seen(run)]
    return [sorted(tuple(window) for part in step for window in part) for step in zip(*parts, strict=True)]


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())


@pytest.mark.parametrize("devices", ["1,2", "2,1"])
def test_a_sweep_over_devices_is_four_runs_of_the_right_size(words, tmp_path, devices):
    done = door("-m", *DDP, f"trainer.devices={devices}", "norm=pre,peri", *WITNESS, *words, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "logs").rglob("sweep.json")
    jobs = json.loads(sweep.read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["finished"] * 4
    runs = [Path(job["dir"]) for job in jobs]
    assert len(list((tmp_path / "logs").rglob("result.json"))) == 4  # no rank has made a directory of its own
    wanted = [(int(count), norm) for count in devices.split(",") for norm in ("pre", "peri")]
    for run, (world, norm) in zip(runs, wanted, strict=True):
        ranks = seen(run)
        assert [(rank["world"], rank["group"]) for rank in ranks] == [(world, world)] * world
        assert len({rank["pid"] for rank in ranks}) == world
        everything = [window for step in steps(run) for window in step]
        assert len(everything) == len(set(everything)) == 4 * STEPS  # each window once
        assert steps(run) == steps(runs[0])  # and the same ones in the same step, however they are shared out
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert (config["trainer"]["devices"], config["choices"]["norm"]) == (world, norm)
    for one, two in ((0, 2), (1, 3)):
        assert losses(runs[one])[-1][1] == pytest.approx(losses(runs[two])[-1][1], rel=1e-4)

    wandb = sorted((tmp_path / "logs" / "wandb").glob("offline-run-*"))
    assert sorted(folder.name.rpartition("-")[2] for folder in wandb) == sorted(result(run)["id"] for run in runs)
    for run, (world, norm) in zip(runs, wanted, strict=True):
        (fragment,) = (tmp_path / "logs" / "wandb").glob(f"offline-run-*-{result(run)['id']}")
        config = recorded(fragment)["config"]
        assert config["choices"]["norm"] == norm
        assert config["trainer"]["devices"] == world
        assert config["run_dir"] == str(run)


def recorded(fragment: Path) -> dict:
    """A W&B run as `wandb leet` reads it."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(fragment)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"this W&B has no `leet inspect --summary`: {done.stderr.strip()[-80:]}")
    return json.loads(done.stdout)


# --- the same training -----------------------------------------------------------------------------------------------

LM = ["model=gpt"]
IMAGES = ["model=vit", "model.depth=2", "model.width=12", "model.heads=2", "data=digits", "data.batch_size=8"]
SYNC = ["norm_layer=batch", "norm_layer.sync=mean"]
TWICE = ["trainer.accumulate_grad_batches=2"]
TWO = [*DDP, "trainer.devices=2"]
SHARED = {
    # Accumulation has no twin with statistics of a batch: those of half a batch are other ones.
    "language": ("lm", [[], TWO, TWICE, [*TWO, *TWICE]]),
    "images": ("images", [[], TWO, TWICE]),
    "images with statistics of the batch": ("sync", [[], TWO]),
    "images with statistics of half a batch": ("sync", [TWICE, [*TWO, *TWICE]]),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_step_is_the_same_however_it_is_shared_out(words, tmp_path, case):
    what, ways = SHARED[case]
    folders = [word for word in words if word.startswith("paths.")]
    base = [*words, "data.batch_size=8"] if what == "lm" else [*IMAGES, "trainer.threads=1", *folders]
    base += [
        *(SYNC if what == "sync" else []),
        "trainer.precision=64-true",
        "logger=none",
        f"trainer.max_steps={STEPS}",
    ]
    found = []
    for number, way in enumerate(ways):
        run = tmp_path / str(number)
        done = door(*base, *way, f"paths.run_dir={run}")
        assert done.returncode == 0, done.stderr
        found.append(weights(run))
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, value in found[0].items():
            assert torch.allclose(other[name].double(), value.double(), rtol=1e-9, atol=1e-9), name


# --- failures --------------------------------------------------------------------------------------------------------

FAILURES = {
    "rank 1 raises": (["rank=1"], "RankFailed: rank 1: ArithmeticError: boom"),
    "rank 0 raises": (["rank=0"], "ArithmeticError: boom"),
    "rank 1 dies": (["rank=1", "how=exit"], "RankFailed: rank 1: ended with exit code 7"),
    "rank 1 raises while rank 0 waits": (["rank=1", "how=hang"], "RankFailed: rank 1: ArithmeticError: boom"),
    "rank 1 raises before the first step": (["rank=1", "step=0"], "RankFailed: rank 1: ArithmeticError: boom"),
    "rank 1 raises after the last step": (["rank=1", "step=null"], "RankFailed: rank 1: ArithmeticError: boom"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_the_failure_of_one_ends_all_and_is_named(words, tmp_path, case):
    settings, reason = FAILURES[case]
    given = {"rank": "1", "step": "3", "how": "raise"} | dict(setting.split("=") for setting in settings)
    node = ",".join(f"{key}:{value}" for key, value in given.items())
    run = tmp_path / "logs" / "run"
    began = time.monotonic()
    done = door(
        *TWO, PLUGINS, f"+callbacks.fail={{_target_:tests.launch.witness.Fail,{node}}}", *words, "logger=none",
        f"paths.run_dir={run}",
    )  # fmt: skip
    assert time.monotonic() - began < 30 + 30  # of which it takes less than half a minute to start on a slow machine
    assert done.returncode == 1, done.stderr
    assert result(run)["status"] == "failed"
    assert result(run)["reason"] == reason
    assert reason.rpartition("rank 1: ")[2] in done.stderr
    until(lambda: not alive(str(run)), 5)


# --- started by others -----------------------------------------------------------------------------------------------


def start(command: list[str], **environment: str) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | environment
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(processes: list[subprocess.Popen]) -> list[str]:
    told = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(told)
    return told


def torchrun(port: int, *words: str) -> list[subprocess.Popen]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    return [start([*command, f"--node-rank={node}", "run.py", *words]) for node in range(2)]


def srun(port: int, *words: str) -> list[subprocess.Popen]:
    job = {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_JOB_ID": str(port), "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_JOB_NAME": "train", "SLURM_LOCALID": "0", "MASTER_PORT": str(port)}
    ranks = ({"SLURM_PROCID": str(n), "SLURM_NODEID": str(n)} for n in range(2))
    return [start([sys.executable, "run.py", *words], **job, **rank) for rank in ranks]


@pytest.mark.parametrize("starter", [torchrun, srun])
def test_two_machines_are_one_run(words, tmp_path, starter):
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    logs = ["logger=none", *words, *WITNESS]
    folders = [word for word in words if word.startswith("paths.")]
    one = door(*logs, f"paths.run_dir={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    two = [*logs, *DDP, "trainer.devices=1", "trainer.num_nodes=2"]
    ended(starter(find_free_network_port(), *two, "trainer.max_steps=10"))
    (run,) = [path.parent for path in (tmp_path / "logs").rglob("result.json")]
    assert [rank["world"] for rank in seen(run)] == [2, 2]
    assert steps(run) == steps(tmp_path / "one")[:10]
    ended(starter(find_free_network_port(), "resume=last", f"trainer.max_steps={STEPS}", PLUGINS, *folders))
    assert steps(run) == steps(tmp_path / "one")[10:]
    assert result(run)["status"] == "finished"
    assert len(list((tmp_path / "logs").rglob("result.json"))) == 1


def test_a_launcher_of_other_numbers_is_told_what_to_type(words, tmp_path):
    done = [p.communicate(timeout=120)[0] for p in torchrun(29511, "logger=none", *words)]
    assert "torchrun started 2 processes on 2 machine(s)" in done[0]
    assert "say trainer=ddp trainer.devices=1 trainer.num_nodes=2, or start it without torchrun" in done[0]
    assert not (tmp_path / "logs").exists()
