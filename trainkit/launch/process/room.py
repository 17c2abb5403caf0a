"""A run that a GPU has no room for: refused before its weights are moved there, explained where memory ends later."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from trainkit.launch.explain import UserError
from trainkit.launch.footprint import state_bytes
from trainkit.optimizer.partition import roles
from trainkit.plan.memory import GIB
from trainkit.plan.optimizer import optimizer_memory
from trainkit.task.base import Task

LARGEST_STATE = 3  # bytes of state per byte of weights, of the optimizer that holds most
ON_CPU = "DefaultCPUAllocator"  # torch says it where the system gives no more memory


class OutOfMemory(UserError):
    """Memory ended while the run was going on: it failed, which is no mistake in its words."""

    exit_code = 1


def room_of(device: torch.device) -> int | None:
    """The bytes of a GPU's memory; None elsewhere, where memory can be swapped and is shared with others."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def check_room(task: Task, trainer: Trainer) -> None:
    """Raises UserError where weights, gradients and optimizer state alone are more than the GPU holds."""
    room = room_of(trainer.strategy.root_device)
    held = 1 / trainer.world_size if _sharded(trainer) else 1.0
    size = {"bf16-true": 2, "16-true": 2, "64-true": 8}.get(str(trainer.precision), 4)
    weights = sum(p.numel() for p in task.model.parameters()) * size * held
    if room is None or (2 + LARGEST_STATE) * weights <= room:  # spares small models the measuring
        return
    found = roles(task.model)
    trained = sum(p.numel() for tensors in found.values() for p in tensors)
    like = {role: [torch.empty(p.shape, dtype=_dtype(size), device="meta") for p in ps] for role, ps in found.items()}
    state = optimizer_memory(like, task.optimizer_factory).kept * held
    consumers = {"weights": weights, "gradients": trained * size * held, "optimizer state": state}
    if sum(consumers.values()) > room:
        raise UserError(
            f"this run does not fit: {_named(consumers)} alone take {sum(consumers.values()) / GIB:.1f} GiB of each "
            f"device's {room / GIB:.1f}; try {_three(trainer, consumers, room, alone=True)}"
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and ON_CPU in str(error))


def out_of_memory(error: BaseException, trainer: Trainer) -> OutOfMemory:
    """What took the memory when a run met its end, the biggest first, and three remedies."""
    module: LightningModule | None = trainer.lightning_module
    device = trainer.strategy.root_device
    parameters = list(module.parameters()) if module is not None else []
    consumers = {
        "weights": _bytes(parameters),
        "gradients": _bytes([p.grad for p in parameters if p.grad is not None]),
        "optimizer state": state_bytes(trainer.optimizers),
    }
    if device.type == "cuda":
        rest = torch.cuda.max_memory_allocated(device) - sum(consumers.values())
        consumers["activations and temporary tensors"] = max(0, rest)
    room = room_of(device)
    having = f" of {room / GIB:.1f} GiB" if room else ""
    return OutOfMemory(
        f"out of memory on {device}{having} at step {trainer.global_step + 1}: {_named(consumers)}",
        f"try {_three(trainer, consumers, room)}; mode=plan tells what each would need",
        str(error).strip().splitlines()[0],
    )


def _three(trainer: Trainer, consumers: dict[str, Any], room: int | None, *, alone: bool = False) -> str:
    """Three changes that take less memory, those first that help with what takes most; alone: without activations."""
    standing = ("weights", "gradients", "optimizer state")
    batches = f"trainer.accumulate_grad_batches={2 * trainer.accumulate_grad_batches} (smaller micro-batches)"
    passing = [batches, "trainer.activation_checkpointing=true"]
    if str(trainer.precision) == "32-true":
        passing.append("trainer.precision=bf16-mixed")
    needed = sum(consumers.get(name, 0) for name in standing)
    count = max(2, 2 * trainer.world_size if _sharded(trainer) else 2, ceil(needed / room) + 1 if room else 2)
    lasting = [f"trainer=fsdp trainer.devices={1 << (count - 1).bit_length()}"]
    lasting += ["optimizer=lion (half of AdamW's state)", "a smaller model"]
    ordered = lasting if alone or (room is not None and needed > room / 2) else [*passing, *lasting]
    return ", ".join(ordered[:2]) + f" or {ordered[2]}"


def _named(consumers: dict[str, Any]) -> str:
    biggest = sorted(consumers.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in biggest if size)


def _sharded(trainer: Trainer) -> bool:
    return type(trainer.strategy).__name__ in ("FullySharded", "ModelParallelStrategy", "FSDPStrategy")


def _dtype(size: int) -> torch.dtype:
    return {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[size]


def _bytes(tensors: list[Any]) -> int:
    local = [getattr(t, "_local_tensor", t) for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)
