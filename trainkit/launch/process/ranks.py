"""The processes of one run: they agree before the first step, and none goes on, or stays, without the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from trainkit.launch import rundir
from trainkit.launch.console import log
from trainkit.launch.explain import shorten
from trainkit.launch.process import standby
from trainkit.launch.process.launched import launched

POLL = 0.2  # seconds between two looks at the others
NOTICE = 5.0  # seconds that a process waits for the others to say what went wrong, and to notice it themselves
ENDING = 20.0  # seconds that the others may take to end after the first
VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
KEY = "trainkit/run_dir"
# How gloo, NCCL and the store say that another process is gone. It is never the cause.
ECHOES = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "TCPStore", "Broken pipe")


class RankFailed(RuntimeError):
    """Another process of the run failed: `rank 1: RuntimeError: …`."""


# --- one directory ---------------------------------------------------------------------------------------------------


@cache
def _store() -> dist.Store:
    """What all processes of a launch reach before they have a group; it lives on, as the group meets there, too."""
    launch = launched()
    assert launch is not None
    if launch.by == "srun":
        slurm = SLURMEnvironment()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = slurm.main_address, str(slurm.main_port)
    meeting = dist.rendezvous("env://", rundir.rank(), launch.processes, timeout=timedelta(minutes=30))
    return next(iter(meeting))[0]


def tell_directory(directory: Path) -> None:
    """Rank 0 names the run's directory to the others that torchrun or srun started; where there are none, nothing."""
    if launched() is not None:
        _store().set(KEY, str(directory.absolute()))


def told_directory() -> Path:
    """The directory that rank 0 has made, once it has; ends this process where rank 0 is gone before."""
    try:
        return Path(_store().get(KEY).decode())
    except (dist.DistError, RuntimeError) as error:
        sys.exit(f"rank {rundir.rank()}: rank 0 ended before the run began ({shorten(str(error), 80)})")


# --- before the first step -------------------------------------------------------------------------------------------


class Agreement(Callback):
    """Before the first step: as many processes are alive as the run is of, and each reads a share of its own.

    The processes that are alive are counted by summing ones, as gradients are. Raises ValueError in one line.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        ones = torch.ones((), device=device)
        together = dist.is_available() and dist.is_initialized()
        if together:
            dist.all_reduce(ones)
        everyone: list[Any] = [None] * int(ones)
        mine = (trainer.global_rank, trainer.world_size, _share(trainer.train_dataloader))
        if together:
            dist.all_gather_object(everyone, mine)
        else:
            everyone = [mine]
        launch = launched()
        disagreement(everyone, launch.processes if launch else trainer.num_devices * trainer.num_nodes)


def _share(loader: Any) -> dict[str, Any] | None:
    """What a process reads: its part of the step, and where in which data that is. None: a loader of another kind."""
    share = getattr(loader, "share", None)
    if share is None:
        return None
    place = {"rank": share.rank, "world": share.world, "micro_batch": share.micro_batch}
    return place | {"accumulation": share.accumulation, "items": len(loader.source), "position": loader.state_dict()}


def disagreement(everyone: list[tuple[int, int, dict[str, Any] | None]], wanted: int) -> None:
    """Raises ValueError unless the processes that answered are the `wanted` ones and share one set of data.

    everyone: of each process that answered (its rank, the number it believes in, its share).
    """
    alive = len(everyone)
    for rank, world, share in everyone:
        if (alive, world) != (wanted, wanted):
            raise ValueError(
                f"this run is of {wanted} process(es), and rank {rank} believes in {world} where {alive} answered: "
                "it would train on a part of its data. Start it in a fresh shell, or with trainer=ddp"
            )
        if share is not None and (share["rank"], share["world"]) != (rank, wanted):
            raise ValueError(
                f"rank {rank} of {wanted} reads part {share['rank']} of {share['world']} of the data, not its own; "
                "give the data module its trainer (data.trainer)"
            )
        first = everyone[0][2]
        if share is not None and first is not None and share | {"rank": 0} != first | {"rank": 0}:
            raise ValueError(
                f"ranks 0 and {rank} read different data: {first} and {share}. Do they see the same files?"
            )
    if sorted(rank for rank, *_ in everyone) != list(range(wanted)):
        raise ValueError(f"the ranks of this run are {sorted(rank for rank, *_ in everyone)}, not 0 to {wanted - 1}")


# --- to the end together ---------------------------------------------------------------------------------------------


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, without the observer that kills this process before it can say why, and without its threads.

    The further ranks are `python run.py <words>` (standby.py), where Lightning repeats this process's own command line:
    that of a script or a notebook which has called trainkit.run says nothing about the run, and would do all that
    stands before the call once more.
    """

    words: Sequence[str] = ()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        return function(*args, **kwargs)

    def _call_children_scripts(self) -> None:
        self._check_can_spawn_children()
        environment, processes = self.cluster_environment, self.num_processes
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
        os.environ["NODE_RANK"], os.environ["LOCAL_RANK"] = str(environment.node_rank()), "0"
        os.environ["WORLD_SIZE"] = str(processes * self.num_nodes)
        for rank in range(1, processes):
            self.procs.append(standby.rank(rank, self.words, os.environ))


def supervise(trainer: Trainer, words: Sequence[str]) -> None:
    """Puts `Launcher` in the place of Lightning's own; words: of the run, for the ranks that it starts."""
    theirs = trainer.strategy.launcher
    if type(theirs) is _SubprocessScriptLauncher:
        ours = Launcher(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)
        ours.words = words
        trainer.strategy._launcher = ours


@contextmanager
def together(run: rundir.Run, trainer: Trainer, at_the_end: Callable[[], None]) -> Iterator[None]:
    """While open, the failure of any process ends all of them, and rank 0 says whose it was.

    A process that fails writes <run>/rank_<n>.log with its traceback. The others notice by their connection, or by
    that file where they wait for one that will not come; rank 0 raises RankFailed then. Where it waits in foreign
    code that cannot be interrupted, `at_the_end` is called, the failure noted, and the process ended from outside.
    At the end every process waits for all, so that one that fails after the last step is noticed too.
    """
    if trainer.world_size == 1:
        yield
        return
    before = {name: os.environ.get(name) for name in VARIABLES}
    if run.primary:
        for path in run.dir.glob("rank_*.log"):  # of an earlier attempt
            path.unlink()
    watch = Watch(run, trainer, at_the_end)
    watch.start()
    try:
        yield
        if dist.is_initialized():
            trainer.strategy.barrier("the end")
        watch.join_children()
    except Exception as error:
        if not _is_echo(error):
            (run.dir / f"rank_{trainer.global_rank}.log").write_text(traceback.format_exc())
            log.info("rank %d failed: %s: %s", trainer.global_rank, type(error).__name__, error)
            raise
        found = watch.failure(wait=NOTICE)
        if found is None:
            raise
        raise RankFailed(found) from error
    finally:
        watch.stop()
        if launched() is None and run.primary:
            if dist.is_initialized():
                with suppress(Exception):
                    dist.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


class Watch(threading.Thread):
    """Looks after the other processes of a run."""

    def __init__(self, run: rundir.Run, trainer: Trainer, at_the_end: Callable[[], None]):
        super().__init__(daemon=True, name="ranks")
        self.run_, self.rank, self.at_the_end = run, trainer.global_rank, at_the_end
        self.launcher = trainer.strategy.launcher
        self.over = threading.Event()

    @property
    def children(self) -> list[subprocess.Popen[bytes]]:
        return self.launcher.procs if isinstance(self.launcher, _SubprocessScriptLauncher) else []

    def run(self) -> None:
        while not self.over.wait(POLL):
            found = self.failure()
            if found is not None and not self.over.wait(2 * NOTICE):
                self._end(found)

    def failure(self, wait: float = 0.0) -> str | None:
        """`rank 1: RuntimeError: …` of another process that has failed; None where none has within `wait` seconds."""
        deadline = time.monotonic() + wait
        while True:
            for path in sorted(self.run_.dir.glob("rank_*.log")):
                rank = int(path.stem.partition("_")[2])
                if rank != self.rank:
                    said = path.read_text(errors="replace").strip().splitlines()
                    return f"rank {rank}: {shorten(said[-1]) if said else 'failed'}"
            codes = [child.poll() for child in self.children]
            dead = next((i for i, code in enumerate(codes) if code is not None and code < 0), None)
            if dead is None and time.monotonic() >= deadline:
                dead = next((i for i, code in enumerate(codes) if code), None)
            if dead is not None:
                return f"rank {dead + 1}: {_ended(codes[dead])}"
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL)

    def join_children(self) -> None:
        """Waits for the processes that this one started; raises RankFailed where one does not end well."""
        deadline = time.monotonic() + ENDING
        for rank, child in enumerate(self.children, 1):
            try:
                code = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise RankFailed(f"rank {rank}: was still there {ENDING:.0f} s after the end") from None
            if code:
                raise RankFailed(self.failure() or f"rank {rank}: {_ended(code)}")

    def stop(self) -> None:
        """Lets the others end, and ends those that do not."""
        deadline = time.monotonic() + (ENDING if sys.exc_info()[0] is None else NOTICE)
        self.over.set()
        for child in self.children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
        for child in self.children:
            if child.poll() is None:
                child.kill()
                child.wait()

    def _end(self, found: str) -> None:
        """From this thread, as the main one waits for a process that is gone."""
        threading.Thread(target=lambda: (time.sleep(NOTICE), os._exit(1)), daemon=True).start()
        for child in self.children:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGKILL)
        if self.run_.primary:
            print(f"RankFailed: {found}", file=sys.stderr, flush=True)
            self.run_.result |= {"status": "failed", "reason": f"RankFailed: {found}", "ended": time.time()}
            rundir.write_json(self.run_.dir / "result.json", self.run_.result)
            self.at_the_end()
        os._exit(1)


def _is_echo(error: BaseException) -> bool:
    """Whether an error only says that another process is gone."""
    named = isinstance(error, (dist.DistError, RuntimeError)) and any(mark in str(error) for mark in ECHOES)
    return named or isinstance(error, RankFailed)


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"ended by {name}{'; was memory short?' if name == 'SIGKILL' else ''}"
    return f"ended with exit code {code}"
