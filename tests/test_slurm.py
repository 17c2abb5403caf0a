"""A SLURM of one machine, started here: ranks that are SLURM's, and a job that is put back into the queue."""

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port

from tests.test_ranks import DDP, WITNESS, result, seen, words  # noqa: F401  # words is a fixture
from tests.test_runs import ROOT, door, losses
from tests.test_sweeps import until, weights

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"without {', '.join(MISSING)}: apt-get install slurm-wlm munge"),
]
SETTINGS = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=batch_sched_delay=1,sched_interval=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Callable[..., str]]:
    """Calls a program of SLURM and returns what it prints. The cluster is on loopback, without systemd, and ours."""
    folder = Path(tempfile.mkdtemp(prefix="slurm_"))  # short: the path of a socket has at most 107 characters
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(1024))
    (folder / "key").chmod(0o600)
    host, ports = socket.gethostname().split(".")[0], (find_free_network_port(), find_free_network_port())
    text = SETTINGS.format(host=host, ports=ports, folder=folder, user=getpass.getuser())
    (folder / "slurm.conf").write_text(text)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "WANDB"))}
    env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    places = {"key-file": "key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{name}={folder / file}" for name, file in places.items())]
    conf = str(folder / "slurm.conf")
    daemons: list[subprocess.Popen] = []

    def call(program: str, *arguments: str) -> str:
        done = subprocess.run([program, *arguments], env=env, capture_output=True, text=True, timeout=300)
        return done.stdout if not done.returncode else f"{program}: exit code {done.returncode}: {done.stderr}"

    try:
        with (folder / "daemons.log").open("w") as log:
            for command in (munged, ["slurmctld", "-D", "-f", conf], ["slurmd", "-D", "-f", conf]):
                daemons.append(subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log))
                time.sleep(1)
        deadline = time.monotonic() + 30
        while "idle" not in call("sinfo", "-h", "-o", "%T"):
            if time.monotonic() > deadline:
                pytest.skip(f"SLURM does not start here: {(folder / 'daemons.log').read_text()[-500:]}")
            time.sleep(0.5)
        yield call
        call("scancel", "-u", getpass.getuser())
        until(lambda: not call("squeue", "-h"), 30)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def script(folder: Path, tasks: int, *words: str) -> list[str]:  # noqa: F811
    """A job of so many tasks, as the words after sbatch; what it says goes to <folder>/job.txt."""
    line = " ".join(f"'{word}'" for word in words)
    text = f"#!/bin/bash\ncd '{ROOT}'\nsrun --kill-on-bad-exit=1 '{sys.executable}' run.py {line}\n"
    (folder / "job.sh").write_text(text)
    output = [f"--output={folder / 'job.txt'}", "--open-mode=append"]
    return [f"--ntasks={tasks}", "--job-name=train", "--requeue", *output, str(folder / "job.sh")]


def test_tasks_are_ranks_and_agree_with_a_run_that_starts_its_own(slurm, words, tmp_path):  # noqa: F811
    two = [
        *DDP,
        "trainer.devices=2",
        *words,
        *WITNESS,
        "logger=none",
        "trainer.max_steps=5",
        "trainer.precision=64-true",
    ]
    told = slurm("sbatch", "--wait", *script(tmp_path, 2, *two, f"paths.run_dir={tmp_path / 'slurm'}"))
    assert told.startswith("Submitted"), told + (tmp_path / "job.txt").read_text()  # --wait exits as the job does
    plain = door(*two, f"paths.run_dir={tmp_path / 'plain'}")
    assert plain.returncode == 0, plain.stderr
    ours, theirs = tmp_path / "plain", tmp_path / "slurm"
    assert [(rank["world"], rank["group"]) for rank in seen(theirs)] == [(2, 2)] * 2
    assert [rank["windows"] for rank in seen(theirs)] == [rank["windows"] for rank in seen(ours)]
    assert result(theirs)["status"] == "finished"
    assert losses(theirs) == losses(ours)
    assert all(torch.equal(value, weights(theirs)[name]) for name, value in weights(ours).items())


def test_the_documented_job_is_one_run_of_all_its_tasks(slurm, words, tmp_path):  # noqa: F811
    sizes = ["--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1", f"--chdir={ROOT}"]
    run = tmp_path / "run"
    mine = [*words, *WITNESS, "trainer.accelerator=cpu", "logger=none", "trainer.max_steps=5", f"paths.run_dir={run}"]
    output = f"--output={tmp_path / 'job.txt'}"
    told = slurm("sbatch", "--wait", *sizes, output, str(ROOT / "docs" / "train.sbatch"), *mine)
    assert told.startswith("Submitted"), told + (tmp_path / "job.txt").read_text()
    assert [(rank["world"], rank["group"]) for rank in seen(run)] == [(2, 2)] * 2
    assert result(run)["status"] == "finished"
    assert result(run)["choices"]["trainer"] == "fsdp"


def test_a_task_that_fails_fails_the_job(slurm, words, tmp_path):  # noqa: F811
    fail = ["plugins=[tests]", "+callbacks.fail={_target_:tests.launch.witness.Fail,rank:1,step:3,how:raise}"]
    two = [*DDP, "trainer.devices=2", *words, *fail, "logger=none", f"paths.run_dir={tmp_path / 'run'}"]
    told = slurm("sbatch", "--wait", *script(tmp_path, 2, *two))
    assert "exit code 1" in told
    assert result(tmp_path / "run")["reason"] == "RankFailed: rank 1: ArithmeticError: boom"


@pytest.mark.parametrize("how", ["by its own SIGUSR1", "by the administrator"])
def test_a_job_that_is_put_back_goes_on_with_its_run(slurm, words, tmp_path, how):  # noqa: F811
    steps = ["trainer.max_steps=400", "trainer.val_check_interval=20", "logger=none"]
    whole = door(*words, *steps, f"paths.run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    job = slurm("sbatch", *script(tmp_path, 1, *words, *steps)).split()[-1]
    until(lambda: list((tmp_path / "logs").rglob("last.ckpt")))
    if how == "by its own SIGUSR1":
        slurm("scancel", f"--signal={signal.SIGUSR1.name[3:]}", f"{job}.0")
    else:
        slurm("scontrol", "requeue", job)
    until(lambda: "PENDING" in slurm("squeue", "-h", "-j", job, "-o", "%T"), 60)
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # SLURM would wait for a minute or two
    until(lambda: not slurm("squeue", "-h", "-j", job))
    (found,) = (tmp_path / "logs").rglob("result.json")
    run = found.parent
    assert result(run)["status"] == "finished", (tmp_path / "job.txt").read_text()
    assert json.loads(found.read_text())["slurm"]["job"] == job
    assert losses(run) == losses(tmp_path / "whole")
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(tmp_path / "whole").items())
