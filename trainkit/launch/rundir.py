"""Run directories: how they are named, found again, locked, and what stands in them.

logs/<name>/<date>_<time>_<id>/ holds config.yaml, metrics.jsonl, result.json, run.log, checkpoints/ and figures/;
the jobs of a sweep are the numbered folders of one such directory.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from trainkit.launch.explain import UserError

SHARED_DIR = "TRAINKIT_RUN_DIR"  # tells the further ranks of a run the directory that rank 0 made


def rank() -> int:
    """This process's rank as its launcher set it, 0 where there is one process."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def new_dir(log_dir: str | Path, name: str) -> Path:
    """<log_dir>/<name>/<date>_<time>_<id>, not made yet; id is random, so that two starts in one second differ."""
    return Path(log_dir) / name / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{secrets.token_hex(3)}"


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


def find(resume: str, log_dir: str | Path, name: str | None = None, *, key: str = "resume") -> Path:
    """The run that `resume` means: a run directory, or `last`, the one started last below log_dir (or below name).

    Raises UserError where there is none; `key` is the one that asks.
    """
    if resume == "last":
        root = Path(log_dir) / name if name else Path(log_dir)
        found = (path.parent for path in root.rglob("result.json") if is_run(path.parent))
        runs = [run for run in found if not is_run(run.parents[1])]  # <run>/convert/<form> is a run's, not a run
        if not runs:
            raise UserError(f"{key}=last: there is no run below {str(root)!r}. Give a directory: {key}=DIR")
        return max(runs, key=lambda run: read_json(run / "result.json").get("started", 0))
    path = Path(resume).expanduser()
    if not is_run(path):
        what = "does not exist" if not path.exists() else "is no run directory: it lacks result.json or config.yaml"
        raise UserError(f"{key}={resume}: {what}. Runs are below {str(log_dir)!r}; {key}=last takes the newest")
    return path


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that is complete or absent, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file, indent=2, default=str)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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
            self._lock = _lock(self.dir)
            write_json(self.dir / "result.json", self.result)
            os.environ[SHARED_DIR] = str(self.dir)
        return self

    def __exit__(self, *_: object) -> None:
        if self.primary and self._lock is not None:
            write_json(self.dir / "result.json", self.result)
            os.environ.pop(SHARED_DIR, None)
            self._lock.close()

    def checkpoint(self, which: str = "last") -> Path | None:
        path = self.dir / "checkpoints" / f"{which}.ckpt"
        return path if path.is_file() else None


def _lock(directory: Path) -> IO[str]:
    """Holds the directory for this process, as long as the file stays open; UserError where another one has it."""
    import fcntl

    file = (directory / ".lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UserError(f"{str(directory)!r} is in use by a live run; wait for it or stop it first") from None
    return file
