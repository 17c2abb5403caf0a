"""trainer.precision: what a device can compute in, and with `auto` what it is fastest in."""

from __future__ import annotations

import torch

from trainkit.launch.process.machine import bfloat16_unit

PRECISIONS = ("auto", "64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")


def check_precision(precision: str, accelerator: str) -> None:
    """Raises ValueError for a precision that no device has, or that this one has not."""
    if precision not in PRECISIONS:
        raise ValueError(f"trainer.precision is one of {', '.join(PRECISIONS)}; got {precision}")
    if accelerator == "cpu" and precision == "16-mixed":
        raise ValueError(
            "trainer.precision=16-mixed needs a GPU: CPUs have no float16 units to scale a loss for. Try bf16-mixed"
        )


def choose_precision(accelerator: str) -> tuple[str, str]:
    """What trainer.precision=auto stands for on this machine, and why: ("bf16-mixed", "its CPU has AMX").

    bf16-mixed, torch.autocast in bfloat16 over float32 weights, where the hardware multiplies bfloat16 matrices faster
    than float32 ones: NVIDIA GPUs from Ampere on, CPUs with AMX or AVX-512 BF16. Elsewhere bfloat16 is emulated and
    slower, so float32; also on Apple's GPUs, where it was not measured.
    """
    kind = device_kind(accelerator)
    if kind == "cuda":
        name = torch.cuda.get_device_name()
        if torch.cuda.get_device_capability() >= (8, 0):
            return "bf16-mixed", f"{name} multiplies bfloat16 matrices fastest"
        return "32-true", f"{name} has no bfloat16 units"
    if kind == "mps":
        return "32-true", "bfloat16 was not measured on Apple's GPUs"
    unit = bfloat16_unit()
    return ("bf16-mixed", f"this CPU has {unit}") if unit else ("32-true", "this CPU has no bfloat16 units")


def device_kind(accelerator: str) -> str:
    """cuda, mps or cpu: what Lightning takes for trainer.accelerator on this machine."""
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        return "cuda"
    if accelerator in ("gpu", "mps", "auto") and torch.backends.mps.is_available():
        return "mps"
    return "cpu"
