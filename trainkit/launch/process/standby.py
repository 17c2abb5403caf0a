"""Further ranks that start when rank 0 does: each imports what a run needs, and then waits for its words.

Lightning starts them when the run is built, so that a run of several processes takes the time of two starts one after
the other. What a rank is told, its environment, modules' folders and words, comes through its standard input, as a line
of JSON; where that ends without one, there is no run and the process ends too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from trainkit.launch.process.children import bound
from trainkit.launch.process.launched import launched
from trainkit.launch.sources import RUN

WAITING = "TRAINKIT_STANDBY"  # set in a process that is to wait
_waiting: dict[int, subprocess.Popen[bytes]] = {}  # by local rank


def start(cfg: Mapping[str, Any], words: Sequence[str]) -> None:
    """Starts the further ranks of this machine, as far as the configuration of a run says how many they are.

    words: those of the run, for whoever lists processes.
    """
    trainer = cfg["trainer"]
    engine, devices = trainer.get("strategy", "auto"), trainer.get("devices", 1)
    started = launched() is not None or "LOCAL_RANK" in os.environ
    if cfg["mode"] != "train" or engine not in ("ddp", "fsdp") or started or isinstance(devices, str):
        return
    count = devices if isinstance(devices, int) else len(devices)
    for number in range(1, count):
        environment = os.environ | {WAITING: "1", "LOCAL_RANK": str(number)}
        command = [sys.executable, str(RUN), *words]
        _waiting[number] = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, preexec_fn=bound())


def rank(number: int, words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The process of local rank `number` of the run of `words`: the one that waits, or a new one.

    It finds modules where this process does.
    """
    environment = {**environment, "LOCAL_RANK": str(number)}
    path = [os.path.abspath(folder) for folder in sys.path]
    process = _waiting.pop(number, None)
    if process is not None:
        assert process.stdin is not None
        message = {"words": list(words), "environment": environment, "path": path}
        try:
            with process.stdin as pipe:
                pipe.write(json.dumps(message).encode() + b"\n")
            return process
        except BrokenPipeError:  # it is gone: somebody else has ended it
            process.kill()
            process.wait()
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.Popen([sys.executable, str(RUN), *words], env=environment)


def told(argv: list[str], module: str) -> list[str]:
    """The words of this process: `argv`, or in one that waits what rank 0 tells it, once `module` is imported."""
    if os.environ.pop(WAITING, None) is None:
        return argv
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; rank 0 gets it too, and ends this one
    import_module(module)
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)
    signal.signal(signal.SIGINT, before)
    message = json.loads(line)
    os.environ.clear()
    os.environ.update(message["environment"])
    sys.path[:] = message["path"]
    return message["words"]
