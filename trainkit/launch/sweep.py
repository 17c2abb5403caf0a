"""`-m`: every job in a process and a directory of its own, so many at a time, and what they came to at the end."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from trainkit.launch import rundir
from trainkit.launch.check.words import of_a_launcher
from trainkit.launch.console import log, show, to_terminal
from trainkit.launch.explain import UserError, shorten
from trainkit.launch.preflight import Plan, check_each
from trainkit.launch.process.children import GRACE, LEFT_OVER, Child, clean_environment, end
from trainkit.launch.process.interruption import OF_A_SWEEP, Interrupted, requeue
from trainkit.launch.process.launched import launched, mark
from trainkit.launch.process.machine import default_threads, gpus
from trainkit.launch.sources import RUN
from trainkit.launch.summary import clock, label, table, varied, write
from trainkit.launch.wandb_report import is_online, publish

if TYPE_CHECKING:
    from trainkit.launch.mode.suggestions import Suggestions
    from trainkit.launch.process.launchers import Outcome

SAID = ("val/loss", "test/loss", "continual/final_average_accuracy")  # of a finished job, in its line
POLL = 0.05  # seconds between two looks at the children
OVER = ("finished", "diverged")  # jobs in these states have their result and are not started again


def sweep(plan: Plan) -> int:
    """Runs the jobs of a checked plan; returns 0 when all of them finished, 1 when any did not, 128 + n after signal n.

    Where hparams_search looks for what training can bear, a job that the guard stopped has diverged, which is a result
    like any other: it counts as neither failed nor missing. A search (mode=search) is a sweep whose jobs are not known
    beforehand.

    A job is a child process with a clean environment and the directory <sweep>/<number>. sweep.json is rewritten after
    every change, so an interrupted sweep still says what it did and `sweep.resume` goes on from there.
    """
    to_terminal()
    first = plan.configs[0]
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 or launched() is not None:
        raise UserError(
            "a sweep starts its processes itself: call run.py -m without torchrun or srun, with trainer.devices=N"
        )
    resumed = first.sweep.resume is not None
    if resumed:
        directory = rundir.find_sweep(first.sweep.resume, first.paths.log_dir, first.name)
    elif first.paths.run_dir:
        directory = rundir.given(first.paths.run_dir)
    else:
        directory = rundir.new_dir(first.paths.log_dir, first.name or first.choices.model)
    jobs = plan.search["trials"] if plan.search and _searches(plan) else len(plan.configs)
    parallel = first.sweep.jobs > 1 and jobs > 1
    there = gpus() if parallel and any(_may_use_gpus(cfg) for cfg in plan.configs) else []
    needs = [need(cfg, there, first.sweep.jobs) for cfg in plan.configs]
    rundir.make(directory)
    held = rundir.lock(directory, "sweep")
    try:
        return Sweep(directory, plan, needs, there, resumed).run()
    finally:
        rundir.unlock(held)


def need(cfg: DictConfig, there: Sequence[str], jobs: int) -> int:
    """How many of the GPUs that are `there` a job gets for itself: none where it uses none, or is alone with them.

    Raises UserError where that is more than there are, or cannot be given out.
    """
    if not there or not _may_use_gpus(cfg):
        return 0
    wanted = cfg.trainer.get("devices", 1)
    if not isinstance(wanted, (int, str)):
        raise UserError(
            f"trainer.devices={list(wanted)} names devices, and sweep.jobs={jobs} gives them out itself",
            f"write how many each job gets: trainer.devices={len(wanted)}",
        )
    number = int(wanted) if str(wanted).isdigit() else max(1, len(there) // jobs)
    if number > len(there):
        raise UserError(f"trainer.devices={wanted}: this machine has {len(there)} GPUs")
    return number


def _searches(plan: Plan) -> bool:
    return plan.search is not None and plan.search["kind"] == "optuna"


def _may_use_gpus(cfg: DictConfig) -> bool:
    return cfg.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")


@dataclass
class Running:
    """A job in progress: its number, its process and its GPUs."""

    number: int
    child: Child
    gpus: list[str]


@dataclass
class Sweep:
    """The jobs of one sweep and how far they are; `record` is what stands in sweep.json.

    needs: the GPUs that each job gets for itself; free: those that no job has. study: where the further jobs of a
    search come from, each when there is room for it; its jobs are checked one by one, as they are about to start.
    """

    directory: Path
    plan: Plan
    needs: list[int]
    free: list[str]
    resumed: bool
    record: dict[str, Any] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)
    leftover: list[tuple[Child, float]] = field(default_factory=list)
    study: Suggestions | None = None
    stopped: bool = False  # whether a failure keeps further jobs from starting

    def __post_init__(self) -> None:
        settings = self.plan.configs[0].sweep
        self.stops = settings.on_error == "stop"
        old = rundir.read_json(self.directory / "sweep.json") if self.resumed else {}
        self.configs = dict(enumerate(self.plan.configs))
        self.gpus = list(self.free)
        self.jobs: list[dict[str, Any]] = []
        if _searches(self.plan):
            self._begin_search(old.get("jobs", []))
        else:
            self.keys = varied(self.plan.overrides)
            before = old.get("jobs", [{}] * len(self.plan.overrides))
            for words, job in zip(self.plan.overrides, before, strict=True):
                self.jobs.append({"overrides": words, "status": "waiting", "seconds": job.get("seconds", 0.0)})
        self.at_once = min(settings.jobs, self.total)
        # The number of threads decides over last bits: what a sweep began with holds for all of its jobs.
        shared = old.get("jobs_at_once", self.at_once)
        self.record = {
            "started": old.get("started", time.time()),
            "words": old.get("words", self.plan.words),
            "jobs_at_once": shared,
            "on_error": settings.on_error,
            "slurm": mark(self.plan.typed),
            "launcher": self.plan.launcher,
            "pid": os.getpid(),
            "search": self.plan.search,
            **({"base": self.plan.overrides[0]} if self.study else {}),
            "jobs": self.jobs,
        }

    @property
    def total(self) -> int:
        """How many jobs there are, those that a search has yet to choose included."""
        return len(self.jobs) + (self.study.left if self.study else 0)

    def run(self) -> int:
        slots = [len(self.free) // need for need in self.needs if need]
        at_once = min([self.at_once, *slots])
        pace = f", {at_once} at a time" if self.at_once > 1 else ""
        short = f" ({len(self.free)} GPUs)" if at_once < self.at_once else ""
        jobs = f"{self.total} job" + "s" * (self.total > 1)
        log.info("%s %s: %s%s%s", "search" if self.study else "sweep", self.directory, jobs, pace, short)
        for number in range(len(self.jobs)):
            if self.resumed:
                self._recall(number)
                if self.study and self.jobs[number]["status"] in OVER:
                    self.study.tell(number, self.jobs[number])
        self._save()
        with signals() if self.plan.launcher == "basic" else nullcontext([]) as received:
            try:
                if self.plan.launcher == "basic":
                    self._all(lambda: bool(received))
                else:
                    self._through_the_launcher()
            except KeyboardInterrupt:
                received.append(signal.SIGINT)
            finally:
                number = signal.SIGINT if received[:1] == [signal.SIGINT] else signal.SIGTERM
                end([job.child for job in self.running], number, GRACE, hurry=lambda: len(received) > 1)
                for job in list(self.running):
                    self._ended(job, stopped=True)
                end([child for child, _ in self.leftover], 0, LEFT_OVER, hurry=lambda: bool(received))
                self.record["ended"] = time.time()
                self._save(summaries=True)
        log.info("\nsweep %s", self.directory)
        show(table(self.jobs))
        self._conclusion()
        finished = sum(job["status"] in OVER for job in self.jobs)
        if finished < self.total:
            done = "interrupted" if received else "ended"
            log.info("%s with %d of %d jobs finished; go on with", done, finished, self.total)
            launcher = [word for word in self.plan.typed if of_a_launcher(word)]
            how = ["mode=search"] if self.study else ["-m", *launcher]
            log.info("  %s", shlex.join(["python", "run.py", *how, f"sweep.resume={self.directory}"]))
        if received:
            requeue(Interrupted(received[0], "ended the sweep"))
        self._report()  # last, as it may take a while and nothing depends on it
        return 128 + received[0] if received else int(finished < self.total)

    def _all(self, interrupted: Callable[[], bool]) -> None:
        """Starts the waiting jobs in order, each as soon as there is room, and waits for them."""
        waiting = [number for number, job in enumerate(self.jobs) if job["status"] not in OVER]
        while (self._next(waiting) or self.running) and not interrupted():
            while self._next(waiting) and self._room(waiting[0]) and not interrupted():
                self._start(waiting.pop(0))
            time.sleep(POLL)
            for job in list(self.running):
                code = job.child.poll()
                job.child.relay()
                if code is not None:
                    status = self._ended(job)
                    if self.study:
                        self.study.tell(job.number, self.jobs[job.number])
                    if status not in OVER:
                        self._stop(waiting)
            self._sweep_up()

    def _stop(self, waiting: list[int]) -> None:
        """After a failure, starts no more of the waiting jobs where sweep.on_error says so."""
        rest = len(waiting) + (self.study.left if self.study and not self.stopped else 0)
        if self.stops and rest:
            log.info("sweep.on_error=stop: the other %d jobs are not started", rest)
            waiting.clear()
        self.stopped = self.stops

    def _next(self, waiting: list[int]) -> bool:
        """Whether a job is waiting; a search is asked for one where none is, once there is a worker for it."""
        while self.study and not self.stopped and len(self.running) < self.at_once:
            if not waiting and self.study.left:
                waiting.append(self._suggested(self.study))
            if not waiting or waiting[0] in self.configs or self._admitted(self.study, waiting[0]):
                break
            waiting.pop(0)
            self._stop(waiting)
        return bool(waiting)

    def _begin_search(self, before: list[dict[str, Any]]) -> None:
        """A study that knows the jobs of an earlier start."""
        from trainkit.launch.mode.suggestions import Suggestions

        search = self.plan.search
        assert search is not None
        self.study = Suggestions(search, self.plan.overrides[0], before, self.plan.configs[0].sweep.jobs)
        self.keys = list(self.study.entries)
        self.configs = {}
        for job in before:
            self._list(job["params"], job.get("seconds", 0.0))

    def _list(self, params: dict[str, Any], seconds: float = 0.0) -> None:
        assert self.study is not None
        entry = {"overrides": self.study.words(params), "params": params, "status": "waiting", "seconds": seconds}
        self.jobs.append(entry)

    def _suggested(self, study: Suggestions) -> int:
        """The number of a new job of the search."""
        number = len(self.jobs)
        self._list(study.ask(number))
        return number

    def _admitted(self, study: Suggestions, number: int) -> bool:
        """Whether a job of a search can be run; one that cannot has failed, for the reason that the checks give."""
        job = self.jobs[number]
        try:
            (cfg,) = check_each([job["overrides"]])
            gpus = need(cfg, self.gpus, self.plan.configs[0].sweep.jobs)
        except UserError as error:
            job |= {"status": "failed", "reason": shorten(str(error))}
            study.tell(number, job)
            self._save()
            log.info("%s  cannot be run: %s  [%d/%d]", self._name(number), job["reason"], self._done(), self.total)
            return False
        self.configs[number] = cfg
        self.needs += [0] * (number + 1 - len(self.needs))
        self.needs[number] = gpus
        return True

    def _done(self) -> int:
        return sum(job["status"] not in ("waiting", "running") for job in self.jobs)

    def _through_the_launcher(self) -> None:
        """Hands the waiting jobs to a Hydra launcher and notes each as it ends, wherever that was."""
        from trainkit.launch.process.launchers import launch

        waiting = [number for number, job in enumerate(self.jobs) if job["status"] not in OVER]
        for number in waiting:
            target = self.directory / str(number)
            job = self.jobs[number]
            words = [word for word in job["overrides"] if not word.startswith("paths.run_dir=")]
            job["words"] = [*words, *self._place(number, target)]
            target.mkdir(exist_ok=True)
        self._save()

        def ended(outcome: Outcome) -> None:
            job = self.jobs[outcome.number]
            del job["words"]
            job |= {"status": "running", "dir": str(self.directory / str(outcome.number)), "pid": outcome.pid}
            self._conclude(outcome.number, outcome.code, outcome.pid, outcome.said, outcome.seconds)

        launch(self.plan, self.directory, waiting, ended)
        rest = sum(job["status"] == "waiting" for job in self.jobs)
        if self.stops and rest:
            log.info("sweep.on_error=stop: the other %d jobs were not started", rest)

    def _room(self, number: int) -> bool:
        return len(self.running) < self.at_once and self.needs[number] <= len(self.free)

    def _recall(self, number: int) -> None:
        """Takes over what an earlier start of the sweep reached in this job; its own result.json knows best."""
        result = rundir.read_json(self.directory / str(number) / "result.json")
        status = "diverged" if self.plan.search and rundir.diverged(result) else result.get("status")
        if status in OVER:
            self._note(number, result, status)
            if status == "diverged":
                self.jobs[number]["reason"] = reason(result, 1, "")
            log.info("%s  %s before", self._name(number), status)

    def _start(self, number: int) -> None:
        job, target = self.jobs[number], self.directory / str(number)
        words = [word for word in job["overrides"] if not word.startswith("paths.run_dir=")]
        words += self._place(number, target)
        taken, self.free = self.free[: self.needs[number]], self.free[self.needs[number] :]
        environment = (
            clean_environment() | {OF_A_SWEEP: "1"} | ({"CUDA_VISIBLE_DEVICES": ",".join(taken)} if taken else {})
        )
        quiet = self.at_once > 1
        if not quiet:
            log.info("\n%s", self._name(number))
        target.mkdir(exist_ok=True)
        job |= {"status": "running", "dir": str(target)}
        self._save()
        child = Child([sys.executable, str(RUN), *words], environment, target / rundir.CONSOLE, quiet=quiet)
        self.running.append(Running(number, child, taken))
        job["pid"] = child.pid
        self._save()

    def _place(self, number: int, target: Path) -> list[str]:
        """The words that say where a job runs: on from its checkpoint, or afresh in a directory that is empty."""
        if rundir.is_run(target):
            return [f"resume={target}"]
        if target.is_dir():
            rundir.check_free(target)
            shutil.rmtree(target)  # of a start that was killed before it had a configuration, so before any checkpoint
        cfg, shared = self.configs[number], self.record["jobs_at_once"]
        open_threads = shared > 1 and "threads" in cfg.trainer and cfg.trainer.threads is None
        threads = default_threads(cfg.trainer.get("devices", 1), shared)
        return [f"paths.run_dir={target}", *([f"trainer.threads={threads}"] if open_threads else [])]

    def _ended(self, job: Running, *, stopped: bool = False) -> str:
        """Notes how a job ended and says so in a line; its status."""
        child = job.child
        self.running.remove(job)
        self.free += job.gpus
        code = child.poll()
        if child.send(0):
            self.leftover.append((child, time.monotonic() + LEFT_OVER))
        seconds = time.time() - child.started
        return self._conclude(job.number, code, child.pid, child.said(), seconds, stopped=stopped)

    def _conclude(
        self, number: int, code: int | None, pid: int, said: str, seconds: float, *, stopped: bool = False
    ) -> str:
        result = rundir.read_json(self.directory / str(number) / "result.json")
        own = result.get("pid") == pid
        if code == 0 or (own and result["status"] == "finished"):
            status = "finished"
        else:
            status = "interrupted" if stopped or (own and result["status"] == "interrupted") else "failed"
        if status == "failed" and self.plan.search and own and rundir.diverged(result):
            status = "diverged"
        entry = self.jobs[number]
        entry |= {"exit_code": code, "seconds": entry["seconds"] + seconds}
        self._note(number, result if own or status == "finished" else {}, status)
        if status in ("failed", "diverged"):
            entry["reason"] = reason(result if own else {}, code or 0, said)
            self._keep_traceback(number, said)
        self._save()
        took = clock(entry["seconds"])
        if status == "finished":
            metrics = entry["metrics"]
            told = [f"{name} {metrics[name]:.4f}" for name in SAID if name in metrics]
        else:
            told = [entry["reason"], str(self._log(number))] if status in ("failed", "diverged") else []
        log.info("%s", "  ".join([self._name(number), status, *told, took, f"[{self._done()}/{self.total}]"]))
        return status

    def _note(self, number: int, result: dict[str, Any], status: str) -> None:
        """Copies into the record what a run's result.json says about it."""
        known = {name: result[name] for name in ("parameters", "optimizer_state_bytes") if name in result}
        metrics = result.get("metrics", {}) if status == "finished" else {}
        self.jobs[number] |= {"status": status, "dir": str(self.directory / str(number)), "metrics": metrics, **known}

    def _keep_traceback(self, number: int, said: str) -> None:
        """A job that failed before its run began has told the console only: its log gets the traceback too."""
        path = self._log(number)
        written = path.read_text(errors="replace") if path.is_file() else ""
        if said.strip() and said.strip().splitlines()[-1] not in written:
            with path.open("a") as file:
                file.write(said)

    def _log(self, number: int) -> Path:
        return self.directory / str(number) / "run.log"

    def _name(self, number: int) -> str:
        return f"job {number}  {label(self.jobs[number], self.keys)}"

    def _sweep_up(self) -> None:
        """Kills what ended jobs have left behind, once it had the time to end by itself."""
        for child, deadline in self.leftover:
            child.send(0 if time.monotonic() < deadline else signal.SIGKILL)
        self.leftover = [(child, deadline) for child, deadline in self.leftover if child.send(0)]

    def _save(self, *, summaries: bool = False) -> None:
        """A full disk ends jobs, which say so; it must not end what looks after them."""
        try:
            rundir.write_json(self.directory / "sweep.json", self.record)
            if summaries:
                write(self.directory, self.jobs)
        except OSError as error:
            log.warning("%s could not be written (%s)", self.directory / "sweep.json", error.strerror)

    def _conclusion(self) -> None:
        """What the sweep was for: tables here, and files beside summary.md."""
        search = self.plan.search
        if search is None:
            return
        try:
            if self.study is None:
                from trainkit.report import lr_sensitivity

                told = lr_sensitivity.write(self.directory, self.jobs, search["key"])
            else:
                from trainkit.report import search as found

                told = found.write(self.directory, self.jobs, search, self.study.importances())
        except Exception as error:  # as with the report: the jobs have their results
            why = f"{type(error).__name__}: {shorten(str(error))}"
            log.warning("what was found could not be written (%s); the sweep's numbers are in summary.md", why)
            return
        for one in told:
            log.info("%s", one) if isinstance(one, str) else show(one)

    def _publish(self, page: Path) -> None:
        """The report beside the runs in W&B, where those went online."""
        dirs = [Path(job["dir"]) for job in self.jobs if "dir" in job]
        ids = [rundir.read_json(directory / "result.json").get("id", "") for directory in dirs]
        for cfg in self.plan.configs:
            if "wandb" in str(cfg.choices.logger) and is_online(Path(cfg.paths.log_dir), filter(None, ids)):
                try:
                    publish(cfg, self.directory, page)
                except (Exception, KeyboardInterrupt) as error:  # whatever W&B raises, the page is on disk
                    told = f"{type(error).__name__}: {shorten(str(error))}"
                    log.warning("the report was not uploaded to W&B (%s); it is %s", told, page)
                return

    def _report(self) -> None:
        """report.html, in which nothing is worth failing a sweep for."""
        try:
            from trainkit.report.page import of_directory

            page = of_directory(self.directory)
            log.info("report %s", page)
        except KeyboardInterrupt:
            log.warning("the report was not finished; python -m trainkit.report %s writes it", self.directory)
        except Exception as error:
            told = f"{type(error).__name__}: {shorten(str(error))}"
            log.warning("the report could not be written (%s); the sweep's numbers are in summary.md", told)
        else:
            self._publish(page)


def reason(result: dict[str, Any], code: int, said: str) -> str:
    """Why a job failed, in one line: as its run says, else by what it wrote last or the signal that ended it."""
    if result.get("status") == "failed" and result.get("reason"):
        return shorten(str(result["reason"]))
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = "; was memory short?" if name == "SIGKILL" else ""
        return f"ended by {name}{hint}"
    lines = said.strip().splitlines()
    if code == 2:  # a sentence about the mistake, of at most three lines
        return shorten(" ".join(lines[-3:]))
    return shorten(lines[-1]) if lines else f"exit code {code}"


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the signals that ask this process to stop, instead of being stopped in the middle of something."""
    received: list[int] = []
    asking = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may listen
        return
    asking = [number for number in asking if signal.getsignal(number) != signal.SIG_IGN]  # nohup, or a job with &
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in asking]
    try:
        yield received
    finally:
        for number, handler in zip(asking, before, strict=True):
            signal.signal(number, handler)
