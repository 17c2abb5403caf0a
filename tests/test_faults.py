"""kill -9 at random moments: what is resumed afterwards is, bit for bit, the run that was never killed.

The moments are uniform over the whole life of an unbroken run, imports and evaluation included. How many kills of each
kind is set by FAULTS_PLAIN, FAULTS_DDP, FAULTS_SWEEP and FAULTS_SAVE, the seed by FAULTS_SEED; the table of what was
found is printed at the end of the test session.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.callbacks.test_checkpoint import same
from tests.test_runs import ROOT, SMALL, corpus, words  # noqa: F401  # fixtures
from trainkit.launch import rundir
from trainkit.report.metrics_file import readable

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed process cannot take its children with it"),
]

RUN = [
    *SMALL, "trainer.max_steps=90", "trainer.val_check_interval=20", "trainer.accumulate_grad_batches=2",
    "trainer.log_every_n_steps=1", "callbacks.checkpoint.every_n_steps=4", "model.dropout=0.1", "norm_layer=batch",
    "norm_layer.count=step",
]  # fmt: skip
RUN.remove("trainer.log_every_n_steps=2")
LARGE = ["model.width=128", "callbacks.checkpoint.every_n_steps=2"]  # a save takes a good part of such a run
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "norm_layer.sync=mean"]
OPTIMIZERS = ("adamw", "muon")
CLOCKS = ("steps_per_second", "tokens_per_second", "mfu")  # what no two runs have in common
COMPARED = ("global_step", "state_dict", "optimizer_states", "lr_schedulers")


def kills(kind: str, default: int) -> int:
    return int(os.environ.get(f"FAULTS_{kind}", default))


def start(argv, **options) -> subprocess.Popen:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "SLURM"))}
    pipe = options.pop("stdout", subprocess.DEVNULL)
    return subprocess.Popen(
        [sys.executable, "run.py", *argv], cwd=ROOT, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )


def finish(argv) -> None:
    done = start(argv, stdout=subprocess.PIPE)
    told = done.communicate(timeout=300)[0]
    assert done.returncode == 0, f"{argv}: {told}"


def processes(mark: str) -> dict[int, str]:
    """The live processes of run.py that mention `mark`, and their local ranks where they have one."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
        except OSError:
            continue
        if mark.encode() in line and b"run.py" in line:
            ranks = [word for word in environment.split(b"\0") if word.startswith(b"LOCAL_RANK=")]
            found[int(path.name)] = ranks[0].decode().partition("=")[2] if ranks else ""
    return found


def wait(condition, seconds=120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def runs(logs: Path) -> list[Path]:
    """The runs below a folder, in the order of a sweep's jobs."""
    return sorted(
        (path.parent for path in logs.rglob("config.yaml") if rundir.is_run(path.parent)), key=lambda p: p.name
    )


def unlike(a: Path, b: Path) -> list[str]:
    """The names of what differs between two finished runs."""
    rows = [
        [json.dumps({k: v for k, v in row.items() if k not in CLOCKS}) for row in readable(run / "metrics.jsonl")]
        for run in (a, b)
    ]
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (a, b)]
    finals = [json.loads((run / "result.json").read_text()) for run in (a, b)]
    metrics = [{k: v for k, v in final["metrics"].items() if k not in CLOCKS} for final in finals]
    different = [part for part in COMPARED if not same(states[0][part], states[1][part])]
    different += ["metrics.jsonl"] if rows[0] != rows[1] or not rows[0] else []
    different += ["final metrics"] if metrics[0] != metrics[1] else []
    return different + [f"status {final['status']}" for final in finals if final["status"] != "finished"]


@dataclass
class Tally:
    """What happened to one kind of run; moments: of the kills, as parts of an unbroken life."""

    kind: str
    life: float
    moments: list[float] = field(default_factory=list)
    began: int = 0  # anew, as nothing was there yet
    resumed: int = 0
    finished: int = 0  # killed when its result was written
    inside: int = 0  # a save
    different: list[str] = field(default_factory=list)

    def row(self) -> str:
        bins = [sum(int(10 * min(m, 0.999)) == i for m in self.moments) for i in range(10)]
        return (
            f"{self.kind:<8} {len(self.moments):>5} {self.inside:>7} {self.resumed:>8} {self.began:>6} "
            f"{self.finished:>6} {len(self.different):>11}   {self.life:>5.1f}  {' '.join(map(str, bins))}"
        )


HEAD = "kind     kills in save  resumed  anew   over   different   life/s  kills by tenth of the life"


@pytest.fixture
def harness(tmp_path, words, record_property):  # noqa: F811
    """Kills so many runs of a kind and compares them with the one that was not killed."""
    folders = [word for word in words if word.startswith(("data", "paths.cache_dir", "logger"))]
    folders = [word for word in folders if not word.startswith("data.batch_size")]

    def kill_all(kind, number, variants, kill, *, multirun=False) -> Tally:
        dice = random.Random(f"{os.environ.get('FAULTS_SEED', 0)} {kind}")
        flag = ["-m"] if multirun else []
        whole, lives = {}, []
        for name, extra in list(variants.items())[:number]:
            finish([*flag, *RUN, *folders, *extra, f"paths.log_dir={tmp_path / 'warm' / name}", "trainer.max_steps=2"])
            began, whole[name] = time.monotonic(), tmp_path / "whole" / name
            finish([*flag, *RUN, *folders, *extra, f"paths.log_dir={whole[name]}"])
            lives.append(time.monotonic() - began)
        tally = Tally(kind, sum(lives) / len(lives))
        for n in range(number):
            name = list(whole)[n % len(whole)]
            logs = tmp_path / f"killed{n}"
            argv = [*flag, *RUN, *folders, *variants[name], f"paths.log_dir={logs}"]
            process, began = start(argv), time.monotonic()
            inside = kill(process, logs, dice, lives[n % len(whole)])
            tally.moments.append((time.monotonic() - began) / lives[n % len(whole)])
            process.wait(timeout=120)
            wait(lambda logs=logs: not processes(str(logs)))
            tally.inside += inside
            there = list(logs.rglob("sweep.json")) if multirun else runs(logs)
            if not multirun and there and rundir.read_json(there[0] / "result.json").get("status") == "finished":
                tally.finished += 1
            elif there:
                tally.resumed += 1
                where = "sweep.resume=last" if multirun else "resume=last"
                finish([*flag, where, f"paths.log_dir={logs}"])
            else:
                tally.began += 1
                finish(argv)
            pairs = list(zip(runs(logs), runs(whole[name]), strict=True))
            found = [f"kill {n} ({name}) {a.name}: {what}" for a, b in pairs for what in unlike(a, b)]
            tally.different += found
        record_property("faults", HEAD)
        record_property("faults", tally.row())
        return tally

    return kill_all


def at_random(process, logs, dice, life) -> bool:
    """Kills it at a moment of its life, all being equally likely; whether that was inside a save."""
    _sleep(process, dice.uniform(0, life))
    process.kill()
    process.wait()
    return any(logs.rglob("*.part"))


def _sleep(process, seconds) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)


def one_rank(process, logs, dice, life) -> bool:
    """Kills one of its ranks; the other one must not go on without it."""
    _sleep(process, dice.uniform(0, life))
    victim = dice.choice(["0", "1"])
    chosen = [pid for pid, rank in processes(str(logs)).items() if (rank or "0") == victim]
    _kill(chosen[0] if chosen else process.pid)
    return any(logs.rglob("*.part"))


def one_of_a_sweep(process, logs, dice, life) -> bool:
    """Kills the sweep, with which its jobs end, or one of its jobs, after which it goes on with the others."""
    _sleep(process, dice.uniform(0, life))
    alive = sorted(processes(str(logs)))
    _kill(dice.choice(alive) if alive else process.pid)
    return any(logs.rglob("*.part"))


def _kill(pid) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def in_a_save(process, logs, dice, life) -> bool:
    """Kills it while a checkpoint is being written, which its unfinished file shows; a random one of the run's."""
    skipped, seen = dice.randrange(30), False
    while process.poll() is None:
        folders = list(logs.glob("*/*/checkpoints"))
        there = any((folder / "last.ckpt.part").exists() for folder in folders)
        if there and not seen:
            skipped -= 1
        seen = there
        if there and skipped < 0:
            process.kill()
            process.wait()
            if any(logs.rglob("*.part")):
                return True
            break  # it was renamed meanwhile
        time.sleep(0.0002)
    return False


def variants(*more):
    """One run per optimizer; the second one's batches are drawn ahead, by threads."""
    return {name: [f"optimizer={name}", f"data.workers={2 * n}", *more] for n, name in enumerate(OPTIMIZERS)}


def test_plain_runs(harness):
    tally = harness("plain", kills("PLAIN", 20), variants(), at_random)
    assert tally.different == []


def test_runs_killed_inside_a_save(harness):
    wanted = kills("SAVE", 8)
    tally = harness("save", wanted + wanted // 4, variants(*LARGE), in_a_save)
    assert tally.different == []
    assert tally.inside >= wanted


def test_runs_of_two_ranks_one_of_which_is_killed(harness):
    tally = harness("ddp", kills("DDP", 10), variants(*DDP), one_rank)
    assert tally.different == []


def test_sweeps(harness):
    two = {name: [f"optimizer={name}", "norm=pre,peri", "sweep.jobs=2"] for name in OPTIMIZERS}
    tally = harness("sweep", kills("SWEEP", 10), two, one_of_a_sweep, multirun=True)
    assert tally.different == []
