"""What this machine has to give to runs, told without importing torch."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int:
    """The bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bfloat16_unit() -> str | None:
    """What the processor multiplies bfloat16 matrices with faster than float32 ones: AMX, AVX-512 BF16, or None.

    Linux tells; elsewhere None.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    units = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16"}
    return next((unit for flag, unit in units.items() if flag in flags), None)


def gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them; MIG slices one by one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return parse(listed)


def parse(listed: str) -> list[str]:
    """The devices in the output of `nvidia-smi -L`."""
    found: list[str] = []
    for block in re.split(r"^(?=GPU \d+:)", listed, flags=re.MULTILINE):
        number = re.match(r"GPU (\d+):", block)
        if number:
            found += re.findall(r"\(UUID: (MIG-[^)]+)\)", block) or [number[1]]
    return found


def default_threads(devices: Any = 1, jobs: int = 1) -> int:
    """The threads of each process where `jobs` runs of so many devices share this machine's cores."""
    return max(1, cores() // (jobs * local_ranks(devices)))


def local_ranks(devices: Any) -> int:
    """The processes that a run starts on this machine."""
    if isinstance(devices, (list, tuple)):
        return max(1, len(devices))
    return int(devices) if str(devices).isdigit() and int(devices) > 0 else 1
