"""A sweep through a Hydra launcher: the same jobs, directories and records, started by joblib, Ray, submitit or SLURM.

What is handed to the launcher is a number. The task function looks it up in sweep.json and starts the child that a
sweep without a launcher would have started, so what a job does can depend on nothing else.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from trainkit.launch import rundir
from trainkit.launch.children import Child
from trainkit.launch.console import log
from trainkit.launch.explain import explained
from trainkit.launch.launched import adopt, launched

if TYPE_CHECKING:
    from trainkit.launch.preflight import Plan

OWN = ".launcher"  # below the sweep: what the launcher itself writes, and how jobs ended
POLL = 0.2


@dataclass
class Outcome:
    """How a job's process ended: its exit code, and the last that it said."""

    number: int
    code: int
    pid: int
    said: str
    seconds: float


def launch(plan: Plan, directory: Path, waiting: Sequence[int], ended: Callable[[Outcome], None]) -> None:
    """Runs jobs through the launcher that the plan names; `ended` is called for each as it ends.

    Raises UserError where the launcher's settings cannot be read; what it raises itself is let through.
    """
    from hydra import compose, initialize
    from hydra._internal.callbacks import Callbacks
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext

    own = (directory / OWN).absolute()
    own.mkdir(exist_ok=True)
    for path in own.glob("*.json"):
        path.unlink()
    words = [word for word in plan.words if word.lstrip("+~").startswith(("hydra/launcher", "hydra.launcher"))]
    words += [f"hydra.sweep.dir='{own}'", "hydra.output_subdir=null", "hydra.mode=MULTIRUN"]
    with explained(" ".join(words)), initialize(config_path=None, version_base="1.3"):
        cfg = compose(overrides=words, return_hydra_config=True)
        context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=cfg)
    jobs = [[f"+number={number}", f"+directory='{directory.absolute()}'"] for number in waiting]
    log.info("hydra/launcher=%s", plan.launcher)
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(own, len(jobs), ended, over), daemon=True)
    watch.start()
    try:
        launcher.launch(jobs, initial_job_idx=0)
    finally:
        over.set()
        watch.join()


def _watch(own: Path, jobs: int, ended: Callable[[Outcome], None], over: threading.Event) -> None:
    """Calls `ended` for each outcome that appears, until the launcher has returned."""
    known: set[Path] = set()
    while True:
        last = over.wait(POLL)
        for path in sorted(set(own.glob("*.json")) - known):
            known.add(path)
            ended(Outcome(**rundir.read_json(path)))
        if last or len(known) == jobs:
            return


def task(cfg: DictConfig) -> None:
    """One job, in whatever process the launcher runs it: starts the child and waits for it."""
    from trainkit.launch.sweep import RUN, clean_environment

    directory, number = Path(cfg.directory), int(cfg.number)
    record = rundir.read_json(directory / "sweep.json")
    job = record["jobs"][number]
    failed = any(other["status"] == "failed" and "exit_code" in other for other in record["jobs"])
    if record.get("on_error") == "stop" and failed:
        return
    adopt()
    # Where SLURM has started one task for each rank, each of them comes here, and the ranks are SLURM's.
    together, rank = launched() is not None, rundir.rank()
    environment = dict(os.environ) if together else clean_environment()
    target = directory / str(number)
    console = target / rundir.CONSOLE if not together or rank == 0 else directory / OWN / f"{number}_{rank}.log"
    child = Child([sys.executable, str(RUN), *job["words"]], environment, console, quiet=True)
    code = child.process.wait()
    if not together or rank == 0:
        outcome = Outcome(number, code, child.pid, child.said(), time.time() - child.started)
        rundir.write_json(directory / OWN / f"{number}.json", asdict(outcome))
