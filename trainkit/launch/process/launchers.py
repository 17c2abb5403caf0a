"""A sweep through a Hydra launcher: the same jobs, directories and records, started by joblib, Ray, submitit or SLURM.

What is handed to the launcher is a number. The task function looks it up in sweep.json and starts the child that a
sweep without a launcher would have started, so what a job does can depend on nothing else.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from trainkit.launch import rundir
from trainkit.launch.check.words import of_a_launcher
from trainkit.launch.console import log
from trainkit.launch.explain import UserError, explained
from trainkit.launch.process.children import GRACE, Child, clean_environment, end
from trainkit.launch.process.launched import adopt, launched
from trainkit.launch.sources import RUN

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

    Raises UserError where the launcher's settings cannot be read or no job was started; what it raises once there are
    some is let through.
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
    words = [word for word in plan.typed if of_a_launcher(word)]
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
    except Exception as error:
        if any((directory / str(number) / rundir.CONSOLE).is_file() for number in waiting):
            raise
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"hydra/launcher={plan.launcher} has started no job: {said}") from error
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


def outcomes(directory: Path) -> list[Outcome]:
    """How the jobs have ended that the launcher has run so far."""
    return [Outcome(**rundir.read_json(path)) for path in sorted((directory / OWN).glob("*.json"))]


def task(cfg: DictConfig) -> None:
    """One job, in whatever process the launcher runs it: starts the child and waits for it."""
    directory, number = Path(cfg.directory), int(cfg.number)
    record = rundir.read_json(directory / "sweep.json")
    job = record["jobs"][number]
    # Told from how jobs have ended, not from sweep.json, which the sweep writes a moment later.
    failed = [outcome.number for outcome in outcomes(directory) if outcome.code]
    if record.get("search"):  # then a divergence is a result
        failed = [n for n in failed if not rundir.diverged(rundir.read_json(directory / str(n) / "result.json"))]
    if record["on_error"] == "stop" and failed:
        return
    adopt()
    # Where SLURM has started one task for each rank, each of them comes here, and the ranks are SLURM's.
    together, rank = launched() is not None, rundir.rank()
    environment = dict(os.environ) if together else clean_environment()
    target = directory / str(number)
    console = target / rundir.CONSOLE if not together or rank == 0 else directory / OWN / f"{number}_{rank}.log"
    child = Child([sys.executable, str(RUN), *job["words"]], environment, console, quiet=True)
    # A queue's jobs outlive whoever has submitted them; the processes of joblib are this machine's and end with it.
    ours = record["launcher"] == "joblib" and os.getppid() == record["pid"]
    while (code := child.poll()) is None:
        if ours and os.getppid() != record["pid"]:  # by then it has another parent
            end([child], signal.SIGTERM, GRACE)
            return
        time.sleep(POLL)
    if not together or rank == 0:
        outcome = Outcome(number, code, child.pid, child.said(), time.time() - child.started)
        rundir.write_json(directory / OWN / f"{number}.json", asdict(outcome))
