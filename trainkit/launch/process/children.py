"""Child processes that do not outlive this one, each the leader of a process group of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trainkit.launch import rundir

PR_SET_PDEATHSIG = 1
TAIL = 1 << 16  # bytes of a console file that are looked at
GRACE = 30.0  # seconds that interrupted jobs may take to end by themselves
LEFT_OVER = 5.0  # seconds that what a child started may take to end after it

# What a launcher or a run leaves in the environment, and what would make the next job part of the last one.
FOREIGN = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
FOREIGN += ("MASTER_PORT", "PL_GLOBAL_SEED", "WANDB_RUN_ID", "WANDB_SERVICE", "WANDB_RESUME", rundir.SHARED_DIR)


def clean_environment() -> dict[str, str]:
    """This process's environment without the traces of another run."""
    return {k: v for k, v in os.environ.items() if k not in FOREIGN and not k.startswith("TORCHELASTIC_")}


def die_with(parent: int) -> None:
    """Lets the kernel kill this process when its parent is gone, however that ended; ends it where it is gone already.

    Linux only, elsewhere nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(f"process {parent}, which started this one, is gone")


def bound() -> Callable[[], None] | None:
    """What a child does between fork and exec to die with this process; made before the fork, where importing is safe.

    Linux only, elsewhere nothing.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def bind() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return bind


class Child:
    """A process and all that it starts.

    Its standard error goes to the file `console`, and is shown here too by `relay` unless it is `quiet`; a quiet
    child's standard output goes to that file as well. A session of its own keeps a terminal's Ctrl-C from it: it is
    told by `send`. Killing this process kills it at once on Linux; elsewhere only what `end` could still reach.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str], console: Path, *, quiet: bool):
        self.console, self.quiet = console, quiet
        self.started = time.time()
        with console.open("ab") as file:
            self.begin = self._shown = file.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file if quiet else None,
                stderr=file,
                start_new_session=True,
                preexec_fn=bound(),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.poll()

    def relay(self) -> None:
        """Shows what it has written to standard error since the last time."""
        if not self.quiet:
            sys.stderr.write(self._read(self._shown))
            sys.stderr.flush()
            self._shown = self.console.stat().st_size

    def said(self) -> str:
        """The last that it has written to the console file."""
        return self._read(max(self.begin, self.console.stat().st_size - TAIL))

    def _read(self, start: int) -> str:
        with self.console.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace")

    def send(self, number: int) -> bool:
        """Sends a signal to it and all that it started; whether there was anything left to get it."""
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
            return False
        return True


def end(children: Sequence[Child], number: int, grace: float, hurry: Callable[[], bool] = lambda: False) -> None:
    """Sends a signal to each child and what it started, then kills what is still there after `grace` seconds.

    `hurry` is asked meanwhile whether to kill at once.
    """
    left = [child for child in children if child.send(number)]
    deadline = time.monotonic() + grace
    while left and time.monotonic() < deadline and not hurry():
        time.sleep(0.02)
        left = [child for child in left if child.poll() is None or child.send(0)]
    for child in left:
        child.send(signal.SIGKILL)
        child.process.wait()
