"""How benches measure: interleaved rounds for time, the allocator's records for memory."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
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
    watch = Peak()
    with watch:
        step()
    return watch.bytes


class Peak(AbstractContextManager[None]):
    """A context after which `bytes` is the most memory that was held inside, beyond what was held before.

    On the CPU that of torch's allocator as the profiler sees it, in this thread and those of the backward.
    """

    bytes = 0

    def __init__(self, device: str = "cpu"):
        self.device = device

    def __enter__(self) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        self._open = ExitStack()
        self._open.enter_context(silent())
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = self._open.enter_context(torch.profiler.profile(activities=activities, profile_memory=True))

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
            return
        self._open.close()
        events: list[Any] = self._profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        held = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            self.bytes = max(self.bytes, held)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What a model and its optimizer hold between two steps: parameters, buffers, gradients and state, each once."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


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
