"""Where the time of a training step goes, by class of operation."""

from __future__ import annotations

import re
import time
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.autograd import DeviceType

from trainkit.bench.timing import silent

# The first class whose pattern is found in an operation's name has it.
CLASSES = {
    "attention": r"scaled_dot_product|flash_attention|efficient_attention",
    "loss": r"log_softmax|nll_loss|cross_entropy|[Ll]inear[Cc]ross",
    "norm": r"layer_norm|rms_norm|batch_norm|group_norm",
    "optimizer": r"_fused_|[Oo]ptimizer\.|_foreach_(add|sub|div|lerp|addc|sqrt)",
    "clip and gradient norms": r"_foreach_(norm|mul)|vector_norm|linalg_norm",
    "matrix products": r"\b(mm|bmm|addmm|baddbmm|matmul|linear|_mkl_linear)\b|gemm|nvjet|cutlass|mkldnn_linear",
    "embedding": r"embedding|index_select",
    "copies and casts": r"copy_|_to_copy|clone|contiguous|fill_|zero_|\bcat\b|stack",
    "activation": r"gelu|silu|relu|sigmoid|tanh",
}
REST, FRAMEWORK = "elementwise and other", "framework (Python, dispatch, data, log)"


class Shares(AbstractContextManager[None]):
    """A context after which `shares` holds each class's part of the time inside, by the operations' own time.

    What no operation took is the framework's: Python, and what it waits for. The profiler's own cost falls on that too,
    so the share is an upper bound.
    """

    shares: dict[str, float]

    def __init__(self, device: str = "cpu"):
        self.device = device

    def __enter__(self) -> None:
        self._open = ExitStack()
        self._open.enter_context(silent())
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = self._open.enter_context(torch.profiler.profile(activities=activities))
        self._since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        total = time.perf_counter() - self._since
        self._open.close()
        spent: dict[str, float] = {}
        for event in self._profile.key_averages():
            if own := self._own(event):
                spent[kind(event.key)] = spent.get(kind(event.key), 0.0) + own
        spent[FRAMEWORK] = max(0.0, total - sum(spent.values()))
        whole = sum(spent.values())
        self.shares = {name: value / whole for name, value in sorted(spent.items(), key=lambda item: -item[1])}

    def _own(self, event: Any) -> float:
        """Seconds in an operation itself, without those that it calls: on a GPU of its kernels, each counted once."""
        if self.device == "cuda":
            return event.self_device_time_total / 1e6 if event.device_type == DeviceType.CUDA else 0.0
        return event.self_cpu_time_total / 1e6 if event.key.startswith("aten::") else 0.0


def kind(name: str) -> str:
    """The class of an operation, such as aten::addmm."""
    return next((label for label, pattern in CLASSES.items() if re.search(pattern, name)), REST)
