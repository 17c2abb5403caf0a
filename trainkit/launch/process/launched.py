"""Who started this process: the user, or torchrun or srun as one of several. Told from the environment alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trainkit.launch.explain import UserError

# srun's words about one process. In a process that srun did not start as one of several they only mislead Lightning,
# which takes any allocation for a launch.
OF_A_TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning starts its processes itself


class Launch(NamedTuple):
    """processes: of the whole run, on so many machines; by: what started them."""

    processes: int
    machines: int
    by: str


def launched() -> Launch | None:
    """The launch that this process is part of, or None where it was started alone."""
    env = os.environ
    if {"TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= set(env):
        processes = int(env["WORLD_SIZE"])
        return Launch(processes, processes // int(env["LOCAL_WORLD_SIZE"]), "torchrun")
    tasks = int(env.get("SLURM_NTASKS") or 1)
    if tasks > 1 and "SLURM_PROCID" in env and env.get("SLURM_JOB_NAME") not in INTERACTIVE:
        return Launch(tasks, int(env.get("SLURM_NNODES") or 1), "srun")
    return None


def adopt() -> None:
    """Gives srun's ranks the name that everything else reads, and hides an allocation that launched nothing."""
    launch = launched()
    if launch is not None and launch.by == "srun":
        os.environ.setdefault("RANK", os.environ["SLURM_PROCID"])
        # Lightning insists on it, and srun sets it only where it was asked for.
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(launch.processes // launch.machines))
    elif launch is None and "SLURM_NTASKS" in os.environ:
        for name in OF_A_TASK:
            os.environ.pop(name, None)


def slurm_job() -> str | None:
    """The name under which SLURM puts this job back into its queue, one task of an array alone; None outside SLURM."""
    env = os.environ
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID')}"
    return env.get("SLURM_JOB_ID")


def mark(words: Sequence[str]) -> dict[str, Any] | None:
    """What a run or a sweep records of the SLURM job that it is part of, so that the job finds it when it is requeued.

    words: as they were typed, since the script of one job may start several runs.
    """
    job = slurm_job()
    return None if job is None else {"job": job, "words": list(words)}


def requeued() -> bool:
    """Whether SLURM has started this job before."""
    return slurm_job() is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def check_launch(trainer: Mapping[str, Any]) -> None:
    """Raises UserError where the launcher has started another number of processes than the run is of."""
    launch = launched()
    if launch is None:
        return
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    local = len(devices) if isinstance(devices, (list, tuple)) else devices
    several = trainer.get("strategy", "auto") != "auto" or launch.processes == 1
    if several and (local, nodes) == (launch.processes // launch.machines, launch.machines):
        return
    engine = "fsdp" if trainer.get("strategy") == "fsdp" else "ddp"
    words = f"trainer.devices={launch.processes // launch.machines} trainer.num_nodes={launch.machines}"
    raise UserError(
        f"{launch.by} started {launch.processes} processes on {launch.machines} machine(s), and the run is of "
        f"trainer.devices={devices} trainer.num_nodes={nodes} trainer.strategy={trainer.get('strategy', 'auto')}",
        f"say trainer={engine} {words}, or start it without {launch.by}",
    )


def check_interactive(trainer: Mapping[str, Any]) -> None:
    """Raises UserError for several processes from a notebook or an interpreter's prompt, which Lightning refuses."""
    interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
    if interactive and trainer.get("strategy", "auto") != "auto" and launched() is None:
        raise UserError(
            f"trainer.strategy={trainer['strategy']} starts further processes, which an interactive session cannot",
            "call python run.py with the same words, here by subprocess or !, or use trainer=cpu or trainer=gpu",
        )
