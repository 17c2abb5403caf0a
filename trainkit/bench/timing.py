"""How benches measure: interleaved rounds for time, the allocator's records for memory."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], object]


def hardware() -> dict[str, object]:
    """The machine, how much of it is used, and when."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.now().isoformat(timespec="minutes"),
    }


def interleaved(
    steps: Mapping[str, Step], rounds: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each step. A round runs each once, so that a slow moment of the machine falls on all."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return {name: median(values) for name, values in seconds.items()}


def peak_bytes(step: Step) -> int:
    """The most memory that torch's CPU allocator holds during `step`, beyond what it held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with silent(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events: list[Any] = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def silent() -> Iterator[None]:
    """Keeps the profiler's own lines, which are not Python's, off the standard error stream."""
    sys.stderr.flush()
    shown = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(shown)


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What a forward keeps for the backward: distinct storages saved by autograd, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = module(x)
    del y
    return sum(size for pointer, size in storages.items() if pointer not in parameters)
