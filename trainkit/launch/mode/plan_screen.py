"""The plan of a run as a table, and as a record."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainkit.plan.memory import GIB, memory, traffic

if TYPE_CHECKING:
    from rich.table import Table

    from trainkit.launch.mode.planner import Planner

DAY = 86400
NOTHING = 1e-3  # of the peak: what is smaller has no row
LITTLE = 0.9  # of the memory: above it, what is not counted (CUDA's own, fragmentation) may be too much


def opening(planner: Planner) -> str:
    """The answer in one line: does it fit?"""
    needed, room = planner.memory.peak, planner.device.bytes
    word = "DOES NOT FIT" if needed > room else "FITS" if needed <= LITTLE * room else "FITS TIGHTLY"
    count = planner.layout.devices
    where = planner.device.name if count == 1 else f"each of {count} x {planner.device.name}"
    return f"{word}: {gib(needed)} of {gib(room)} GiB on {where}, at most {planner.memory.moment}"


def sizes(planner: Planner) -> Table:
    """Parameters, computation, memory by consumer, communication, time."""
    from rich.table import Table

    record, layout, needed = totals(planner), planner.layout, planner.memory
    table = Table(title="plan", show_header=False, title_justify="left", min_width=60)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim", overflow="fold")
    by_role = ", ".join(f"{role} {count:,}" for role, count in planner.roles.items())
    table.add_row("parameters", f"{record['parameters']:,}", by_role)
    table.add_row("assumed", "", planner.assumed)
    unit = planner.unit
    table.add_row(f"FLOPs per {unit}", f"{planner.flops:.4g}", "forward and backward")
    batches = f"{planner.micro_batch} per device x {layout.devices} x {layout.accumulate} accumulated"
    table.add_row(f"{unit}s per step", f"{record['samples_per_step']:,}", f"batch of {batches}")
    if planner.steps:
        table.add_row(
            "the run", f"{record['samples']:.4g} {unit}s", f"{planner.steps:,} steps, {record['flops']:.4g} FLOPs"
        )
    table.add_section()
    for name, size in needed.parts.items():
        if size < NOTHING * needed.peak:
            continue
        table.add_row(name, f"{gib(size)} GiB", _about(name, planner))
    table.add_row("peak per device", f"{gib(needed.peak)} GiB", f"{needed.moment}; not all of these are there at once")
    for recompute in (False, True):
        other = memory(planner.numbers, replace(layout, recompute=recompute))
        words = f"activations {gib(other.activations)} GiB, peak {gib(other.peak)} GiB"
        table.add_row(f"{'with' if recompute else 'without'} checkpointing", "", words)
    table.add_section()
    if layout.devices > 1:
        table.add_row(
            "sent per step", f"{gib(record['sent'])} GiB", f"by each of {layout.devices} devices ({layout.kind})"
        )
    if planner.device.peak:
        each = f"{planner.device.peak / 1e12:.4g} TFLOP/s (half precision)"
        speed = f"at {planner.cfg.plan.mfu:g} of {each}, {layout.devices}x"
        table.add_row(f"{unit}s per second", f"{record['samples_per_second']:,.0f}", speed + _slow(planner))
        if planner.steps:
            table.add_row("days", f"{record['days']:.3g}", f"{record['days'] * 24:.3g} hours")
    else:
        table.add_row(
            f"{unit}s per second", "not known", "for this device; plan.device=H100 plans for one that is listed"
        )
    return table


def totals(planner: Planner) -> dict[str, Any]:
    """The plan as plain numbers; bytes, FLOPs, seconds. samples are tokens, or images."""
    needed, layout = planner.memory, planner.layout
    record: dict[str, Any] = {
        "parameters": planner.numbers.count,
        "parameters_by_role": planner.roles,
        "flops_per_sample": planner.flops,
        "samples_per_step": planner.samples * layout.devices * layout.accumulate,
        "device": planner.device.name,
        "devices": layout.devices,
        "device_bytes": planner.device.bytes,
        "peak_bytes": needed.peak,
        "fits": needed.peak <= planner.device.bytes,
        "bytes": needed.parts,
        "optimizer_state_bytes": sum(planner.numbers.optimizer.state.values()),
        "optimizer_state_by_role": planner.numbers.optimizer.state,
        "sent": traffic(planner.numbers, layout),
    }
    for name, recompute in (("activation_bytes", False), ("activation_bytes_checkpointed", True)):
        record[name] = memory(planner.numbers, replace(layout, recompute=recompute)).activations
    if planner.steps:
        record["samples"] = record["samples_per_step"] * planner.steps
        record["flops"] = record["samples"] * planner.flops
    if planner.device.peak:
        rate = planner.device.peak * planner.cfg.plan.mfu * layout.devices
        record["samples_per_second"] = rate / planner.flops
        if planner.steps:
            record["days"] = record["flops"] / rate / DAY
    return record


def _about(name: str, planner: Planner) -> str:
    layout, state = planner.layout, planner.numbers.optimizer
    part = f" in {layout.devices} parts" if layout.sharded else ""
    if name == "optimizer state":
        by_role = ", ".join(f"{role} {gib(size)}" for role, size in state.state.items() if size)
        beside = f"; {gib(state.beside)} beside it" if state.beside else ""
        return f"{planner.cfg.choices.optimizer}{part}; whole: {by_role}{beside}"
    if name in ("weights", "gradients"):
        return f"{planner.cfg.trainer.get('precision', '32-true')}{part}"
    if name == "activations":
        kept = "inputs of blocks" if layout.recompute else "what blocks keep for the backward"
        return f"{kept}, {planner.micro_batch} {'sequences' if planner.unit == 'token' else 'images'} at once"
    return {"weights gathered": "of two blocks and of all that is in none", "logits and loss": "at most"}.get(name, "")


def _slow(planner: Planner) -> str:
    precision = str(planner.cfg.trainer.get("precision"))
    return f"; trainer.precision={precision} reaches far less" if precision.startswith(("32", "64")) else ""


def gib(size: float) -> str:
    value = size / GIB
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
