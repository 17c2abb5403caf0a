"""Run directories: how they are named, found again, locked, and what stands in them.

logs/<name>/<date>_<time>_<id>/ holds config.yaml, metrics.jsonl, result.json, run.log, checkpoints/ and figures/;
the jobs of a sweep are the numbered folders of one such directory, beside its sweep.json and summaries.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any

from trainkit.launch.console import log
from trainkit.launch.disk import writing
from trainkit.launch.explain import UserError
from trainkit.report.metrics_file import meant, writable

SHARED_DIR = "TRAINKIT_RUN_DIR"  # tells the further ranks of a run the directory that rank 0 made
CONSOLE = "console.log"  # what a sweep keeps of a job's output, in the job's directory and there before the job


def rank() -> int:
    """This process's rank as its launcher set it, 0 where there is one process."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def home(log_dir: str | Path, name: str) -> Path:
    """<log_dir>/<name>, where the runs of that name are; UserError for a name that leads out of log_dir."""
    inner = os.path.normpath(name)
    if os.path.isabs(inner) or inner.split(os.sep)[0] == os.pardir:
        raise UserError(
            f"name={name} leads out of paths.log_dir={log_dir}; give the name of a folder in it, or set paths.log_dir"
        )
    return Path(log_dir) / inner


def new_dir(log_dir: str | Path, name: str) -> Path:
    """<log_dir>/<name>/<date>_<time>_<id>, not made yet; id is random, so that two starts in one second differ."""
    return home(log_dir, name) / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"


def given(run_dir: str) -> Path:
    """The directory that paths.run_dir names, which must be new or empty."""
    path = Path(run_dir).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(f"paths.run_dir: {str(path)!r} is a file; name a new directory")
    if path.exists() and any(entry.name != CONSOLE for entry in path.iterdir()):
        remedy = f"continue it with resume={path}" if is_run(path) else "name a new one"
        if is_sweep(path):
            remedy = f"continue it with -m sweep.resume={path}"
        raise UserError(f"paths.run_dir: {str(path)!r} is not empty, and a run overwrites nothing; {remedy}")
    return path


def next_dir(path: Path) -> Path:
    """`path`, made; where there is one already, path_2, path_3, …"""
    make(path.parent)
    candidates = (path if number == 1 else path.with_name(f"{path.name}_{number}") for number in count(1))
    return next(candidate for candidate in candidates if _made(candidate))


def _made(path: Path) -> bool:
    """Whether this call made the directory, and nobody before."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


def make(path: Path) -> None:
    """Creates a directory that must be writable; UserError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"paths.log_dir: cannot write to {str(path)!r} ({error.strerror}). Try paths.log_dir=/tmp/logs"
        ) from None
    if not os.access(path, os.W_OK):
        raise UserError(f"paths.log_dir: {str(path)!r} is read-only. Try paths.log_dir=/tmp/logs")


def is_run(path: Path) -> bool:
    return (path / "result.json").is_file() and (path / "config.yaml").is_file()


def is_sweep(path: Path) -> bool:
    return (path / "sweep.json").is_file()


def find(resume: str, log_dir: str | Path, name: str | None = None, *, key: str = "resume") -> Path:
    """The run that `resume` means: a run directory, or `last`, the one started last below log_dir (or below name).

    Raises UserError where there is none; `key` is the one that asks.
    """
    if resume == "last":
        root = home(log_dir, name) if name else Path(log_dir)
        found = (path.parent for path in root.rglob("result.json") if is_run(path.parent))
        runs = [run for run in found if not is_run(run.parents[1])]  # <run>/convert/<form> is a run's, not a run
        if not runs:
            raise UserError(f"{key}=last: there is no run below {str(root)!r}. Give a directory: {key}=DIR")
        return max(runs, key=lambda run: read_json(run / "result.json").get("started", 0))
    path = Path(resume).expanduser()
    if not is_run(path):
        what = "does not exist" if not path.exists() else "is no run directory: it lacks result.json or config.yaml"
        if is_sweep(path):
            raise UserError(f"{key}={resume} is a sweep: continue it with python run.py -m sweep.resume={resume}")
        raise UserError(f"{key}={resume}: {what}. Runs are below {str(log_dir)!r}; {key}=last takes the newest")
    return path


def find_sweep(resume: str, log_dir: str | Path, name: str | None = None) -> Path:
    """The sweep that `sweep.resume` means: its directory, or `last`, the one started last below log_dir (or name)."""
    if resume == "last":
        root = home(log_dir, name) if name else Path(log_dir)
        sweeps = [path.parent for path in root.rglob("sweep.json")]
        if not sweeps:
            raise UserError(f"sweep.resume=last: there is no sweep below {str(root)!r}. Give a directory: DIR")
        return max(sweeps, key=lambda sweep: read_json(sweep / "sweep.json").get("started", 0))
    path = Path(resume).expanduser()
    if not is_sweep(path):
        what = "does not exist" if not path.exists() else "is no sweep: it lacks sweep.json"
        remedy = f"continue the run with resume={resume}" if is_run(path) else "sweep.resume=last takes the newest"
        raise UserError(f"sweep.resume={resume}: {what}; {remedy}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return meant(value) if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(writable(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or absent, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Run:
    """One run on disk. Hold it as a context: the directory stays locked, and result.json ends truthful.

    dir: the directory; id: also the W&B run's; overrides: what was asked for; resumed: whether it had been started
    before, and then what result.json said, `before`; primary: whether this process (rank 0) writes.
    """

    dir: Path
    id: str
    overrides: list[str]
    resumed: bool = False
    primary: bool = True
    result: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    _lock: IO[str] | None = None

    def __enter__(self) -> Run:
        if self.primary:
            make(self.dir)
            self._lock = lock(self.dir)
            with writing(self.dir / "result.json", self.dir):
                write_json(self.dir / "result.json", self.result)
            os.environ[SHARED_DIR] = str(self.dir)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.primary and self._lock is not None:
            os.environ.pop(SHARED_DIR, None)
            try:
                write_json(self.dir / "result.json", self.result)
            except OSError as problem:
                if error is None:
                    raise
                log.warning("result.json could not be written (%s)", problem.strerror)  # `error` is what is to be told
            finally:
                unlock(self._lock)


# A lock belongs to the open file, which a fork shares: a loader's worker would hold it for seconds after its run died.
_held: set[IO[str]] = set()
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


def lock(directory: Path, what: str = "run") -> IO[str]:
    """Holds the directory for this process until `unlock`; UserError where another one has it."""
    import fcntl

    file = (directory / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{str(directory)!r} is in use by a live {what}; wait for it or stop it first") from None
    _held.add(file)
    return file


def check_free(directory: Path) -> None:
    """Raises UserError where a live run has the directory."""
    if (directory / ".lock").is_file():
        unlock(lock(directory))


def unlock(file: IO[str]) -> None:
    _held.discard(file)
    file.close()


def diverged(result: dict[str, Any]) -> bool:
    """Whether the guard (callbacks/guard.py) has ended a run, because a loss or a gradient was no number any more."""
    return result.get("status") == "failed" and str(result.get("reason")).startswith("NonFiniteLoss: ")
