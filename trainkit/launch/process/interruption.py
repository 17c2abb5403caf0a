"""How a run ends that a signal asked to stop: its exit code, and back into the queue on SLURM."""

from __future__ import annotations

import os
import signal
import subprocess

from trainkit.launch.console import log
from trainkit.launch.process.launched import slurm_job

OF_A_SWEEP = "TRAINKIT_OF_A_SWEEP"  # set for the jobs of a sweep, which goes back into the queue as a whole


class Interrupted(SystemExit):
    """Ends the process with 128 + the signal's number, as a shell reports it: SIGTERM 143, SIGUSR1 138.

    `message` says what was saved.
    """

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.number = signal.Signals(number)
        self.message = f"{self.number.name} {message}"

    def __str__(self) -> str:
        return self.message


def requeue(stopped: Interrupted) -> None:
    """On SLURM, puts the job back into the queue after SIGUSR1, the warning before its time is over (--signal=USR1@60).

    After SIGTERM it does not: that is scancel, or a preemption, after which SLURM requeues by itself if it is to.
    A sweep that was warned stops its jobs, which save, and goes back as a whole. Either way the same command line goes
    on with the run when the job starts again (trainkit/launch/resume.py).
    """
    job = slurm_job()
    if job is None or os.environ.get(OF_A_SWEEP) or stopped.number != signal.SIGUSR1:
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
        problem = done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem:
        log.warning("warning: scontrol requeue %s failed (%s); submit the job again with resume=last", job, problem)
    else:
        log.info("SLURM job %s is back in the queue", job)
