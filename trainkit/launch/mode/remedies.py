"""What to change where a run does not fit, and the memory that it would need then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainkit.launch.explain import UserError
from trainkit.launch.mode.plan_screen import gib
from trainkit.plan.memory import Memory, Numbers, memory
from trainkit.plan.optimizer import optimizer_memory

if TYPE_CHECKING:
    from trainkit.launch.mode.planner import Planner

SMALLER = ("lion", "muon", "galore", "sinkgd")  # optimizers that hold less than AdamW
PER_NODE, MOST = 8, 4096  # devices that a machine usually has, and that are tried


@dataclass(frozen=True)
class Remedy:
    """words: of the command line; peak: bytes on one device with them."""

    words: str
    peak: int

    def text(self, room: int) -> str:
        return f"  {self.words}: {gib(self.peak)} GiB, {'fits' if self.peak <= room else 'not enough alone'}"


def remedies(planner: Planner, overrides: list[str]) -> list[Remedy]:
    """What helps, what suffices first."""
    found = [*_smaller_batch(planner), *_recompute(planner), *_precision(planner), *_optimizers(planner, overrides)]
    found += _shards(planner)
    needed, room = planner.memory.peak, planner.device.bytes
    helping = [remedy for remedy in found if remedy.peak < needed]
    return sorted(helping, key=lambda remedy: (remedy.peak > room, remedy.peak if remedy.peak > room else 0))


def _smaller_batch(planner: Planner) -> Iterator[Remedy]:
    """The largest micro-batch that fits; where none does, of one."""
    size, layout = planner.micro_batch, planner.layout
    if size == 1:
        return
    one = planner.measured(1)
    for micro in sorted((m for m in range(1, size) if size % m == 0), reverse=True):
        accumulate = layout.accumulate * (size // micro)
        needed = _at(planner, one, micro, accumulate)
        if needed.peak <= planner.device.bytes or micro == 1:
            yield Remedy(f"trainer.accumulate_grad_batches={accumulate} (micro-batches of {micro})", needed.peak)
            return


def _at(planner: Planner, one: Numbers, micro: int, accumulate: int) -> Memory:
    """At a micro-batch between 1 and the planned one, of which both were measured: sizes grow linearly."""
    share = (micro - 1) / (planner.micro_batch - 1)
    numbers = replace(planner.numbers, step=one.step.scaled(planner.numbers.step, share))
    return memory(numbers, replace(planner.layout, accumulate=accumulate))


def _recompute(planner: Planner) -> Iterator[Remedy]:
    if not planner.layout.recompute and planner.numbers.step.blocks:
        needed = memory(planner.numbers, replace(planner.layout, recompute=True))
        yield Remedy("trainer.activation_checkpointing=true", needed.peak)


def _precision(planner: Planner) -> Iterator[Remedy]:
    if planner.device.peak is not None and planner.cfg.trainer.get("precision") == "32-true":
        half = planner.measured(planner.micro_batch, "bf16-mixed")
        yield Remedy("trainer.precision=bf16-mixed", memory(half, replace(planner.layout, block_weight=2)).peak)


def _optimizers(planner: Planner, overrides: list[str]) -> Iterator[Remedy]:
    """Other optimizers at their own settings. Those that need whole matrices are no choice under fsdp."""
    from torch import empty

    from trainkit.launch.job import make
    from trainkit.launch.preflight import check

    kept = [word for word in overrides if not word.lstrip("+~").startswith("optimizer")]
    shapes = {role: [empty(s, device="meta") for s in found] for role, found in planner.shapes.items()}
    for option in SMALLER[:1] if planner.layout.sharded else SMALLER:
        try:
            factory = make(check([*kept, f"optimizer={option}"]).configs[0], "optimizer")
            theirs = optimizer_memory(shapes, factory)
        except (UserError, ValueError):  # words of the command line, or parameters, that it cannot have
            continue
        needed = memory(replace(planner.numbers, optimizer=theirs), planner.layout)
        yield Remedy(f"optimizer={option}", needed.peak)


def _shards(planner: Planner) -> Iterator[Remedy]:
    """The fewest devices, in powers of two, that fit by sharding; the micro-batch stays, so the batch may grow."""
    if planner.device.peak is None or not planner.shardable:
        return
    count = max(2, planner.layout.devices + (planner.layout.kind == "fsdp"))
    count = 1 << (count - 1).bit_length()
    while count <= MOST:
        needed = memory(planner.numbers, planner.sharded(count))
        if needed.peak <= planner.device.bytes:
            break
        count *= 2
    else:
        return
    nodes = -(-count // PER_NODE)
    words = f"trainer=fsdp trainer.devices={min(count, PER_NODE)}" + (
        f" trainer.num_nodes={nodes}" if nodes > 1 else ""
    )
    batch = planner.micro_batch * count * planner.layout.accumulate
    yield Remedy(words + (f" data.batch_size={batch}" if batch != planner.cfg.data.batch_size else ""), needed.peak)
