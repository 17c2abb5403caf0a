"""Memory, communication and time of a run, by arithmetic on what was measured of one pass and one optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainkit.plan.optimizer import OptimizerMemory
    from trainkit.plan.step import Pass, Segment

GIB = 2**30


@dataclass(frozen=True)
class Layout:
    """How a run is spread over devices.

    kind: "single", "ddp" (every device has everything) or "fsdp" (each has its part of weights, gradients and state).
    accumulate: micro-batches per optimizer step. recompute: activation checkpointing of every block. bucket_view:
    gradients of ddp lie in its buckets, and not beside them. reshard: fsdp drops the weights of a block after its
    forward. Bytes per number: block_weight, other_weight: of what fsdp gathers, in blocks and outside of them;
    gradient: of what is summed over devices.
    """

    kind: str = "single"
    devices: int = 1
    accumulate: int = 1
    recompute: bool = False
    bucket_view: bool = True
    reshard: bool = True
    block_weight: int = 4
    other_weight: int = 4
    gradient: int = 4

    @property
    def sharded(self) -> bool:
        return self.kind == "fsdp" and self.devices > 1


@dataclass(frozen=True)
class Numbers:
    """What is known of a model and its step. Sizes in bytes of one device that has everything.

    shapes: of every parameter; block: numbers in the largest block, outside: in all parameters that are in none.
    """

    weights: int
    buffers: int
    gradients: int
    optimizer: OptimizerMemory
    step: Pass
    shapes: list[tuple[int, ...]]
    block: int = 0
    outside: int = 0

    @property
    def count(self) -> int:
        return sum(prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. peak: the most at any moment, `moment` says when; the parts need not be there together.

    gathered: whole weights and gradients that fsdp puts together for a while; buckets: of ddp. activations: what
    forwards leave for the backward, logits: what head and loss take on top of that. step: temporary, of the optimizer.
    """

    weights: int
    gradients: int
    state: int
    gathered: int
    buckets: int
    activations: int
    logits: int
    step: int
    peak: int
    moment: str

    @property
    def parts(self) -> dict[str, int]:
        """The consumers by their names for people, the biggest first."""
        named = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer state": self.state,
            "weights gathered": self.gathered,
            "gradient buckets": self.buckets,
            "activations": self.activations,
            "logits and loss": self.logits,
            "the optimizer's step": self.step,
        }
        return dict(sorted(((k, v) for k, v in named.items() if v), key=lambda pair: -pair[1]))


def memory(numbers: Numbers, layout: Layout) -> Memory:
    """Walks through one optimizer step as Lightning makes it: forward, old gradients freed, backward, step.

    Where batches are accumulated, the gradients stay all along, as those in the buckets of ddp do. fsdp gathers what is
    outside of blocks for the whole pass, and of the blocks two: the one that computes and the next one.
    """
    held = shard(numbers.shapes, layout.devices) if layout.sharded else 1.0
    weights = round(numbers.weights * held) + numbers.buffers
    gradients, state = round(numbers.gradients * held), round(numbers.optimizer.kept * held)
    gathered = buckets = 0
    if layout.sharded:
        inside = 2 * numbers.block if layout.reshard else numbers.count - numbers.outside
        gathered = inside * layout.block_weight + numbers.outside * layout.other_weight
        gathered += numbers.block * layout.gradient  # on the way to their shares, while the next block computes
    if layout.kind == "ddp" and layout.devices > 1:
        buckets, gradients = numbers.gradients, 0 if layout.bucket_view else gradients
    standing = weights + state + gathered + buckets
    peak, moment = _walk(numbers.step, layout, standing, gradients, held)
    step = round(numbers.optimizer.step * held)
    if (stepping := standing + gradients + step) > peak:
        peak, moment = stepping, "in the optimizer's step"
    ends = numbers.step.first, numbers.step.last
    kept = ends[0].kept + sum(_kept(segment, layout) for segment in numbers.step.blocks)
    logits = max(ends[1].forward, ends[1].kept + ends[1].backward - ends[1].gradients)
    parts = {"weights": weights, "gradients": gradients, "state": state, "gathered": gathered, "buckets": buckets}
    return Memory(**parts, activations=numbers.step.batch + kept, logits=logits, step=step, peak=peak, moment=moment)


def _walk(step: Pass, layout: Layout, standing: int, gradients: int, held: float) -> tuple[int, str]:
    """The most bytes of a forward and a backward, and when. held: the share of each gradient that stays here."""
    live, peak, moment = standing + gradients + step.batch, 0, ""
    fresh = gradients > 0 and layout.accumulate == 1  # new gradients take memory that was free before
    casts = 0  # copies of weights that autocast keeps to the end of the forward, though the block does not

    def at(bytes_now: int, when: str) -> None:
        nonlocal peak, moment
        if bytes_now > peak:
            peak, moment = bytes_now, when

    inner = {segment.name for segment in step.blocks}
    for segment in step.segments:
        inside = segment.name in inner
        less = segment.casts if inside and layout.sharded else 0
        most = segment.bare if inside and layout.recompute else segment.forward
        at(live + casts + most - less, f"in the forward of {_called(segment)}")
        live += _kept(segment, layout) if inside else segment.kept
        casts += segment.casts if inside and layout.recompute and not layout.sharded else 0
    if fresh:
        live -= gradients
    for segment in reversed(step.segments):
        inside = segment.name in inner
        kept = _kept(segment, layout) if inside else segment.kept
        less = segment.casts if inside and layout.sharded else 0
        again = segment.kept - less - kept  # what checkpointing computes once more
        at(live + again + segment.backward, f"in the backward of {_called(segment)}")
        live += (round(segment.gradients * (held if inside else 1.0)) if fresh else 0) - kept
    return peak, moment


def _kept(block: Segment, layout: Layout) -> int:
    """What a block leaves for the backward. fsdp gathers its weights in the dtype of computing: no copies."""
    return block.output if layout.recompute else block.kept - (block.casts if layout.sharded else 0)


def _called(segment: Segment) -> str:
    return {"first": "the embedding", "last": "head and loss"}.get(segment.name, segment.name)


def shard(shapes: list[tuple[int, ...]], shards: int) -> float:
    """The share of all numbers that the fullest device holds: every parameter is cut along its first axis, evenly."""
    whole = sum(prod(shape) for shape in shapes)
    mine = sum(ceil(shape[0] / shards) * prod(shape[1:]) if shape else 1 for shape in shapes)
    return mine / whole if whole else 1.0


def traffic(numbers: Numbers, layout: Layout) -> int:
    """Bytes that a device sends in one optimizer step, by ring algorithms.

    ddp sums gradients once: 2 (N - 1)/N of their bytes. fsdp gathers the weights for the forward of every micro-batch,
    those of blocks again for its backward, and reduces the gradients as often: (N - 1)/N of their bytes each.
    """
    n = layout.devices
    if layout.kind == "ddp":
        return round(2 * (n - 1) / n * numbers.count * layout.gradient)
    if layout.kind == "fsdp":
        blocks = (2 if layout.reshard else 1) * (numbers.count - numbers.outside) * layout.block_weight
        once = blocks + numbers.outside * layout.other_weight + numbers.count * layout.gradient
        return round((n - 1) / n * once * layout.accumulate)
    return 0
