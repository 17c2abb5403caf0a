"""Norm layers with a memory: statistics and counters that move once per optimizer step.

After each optimizer step call `advance(model)`, for instance from `optimizer.register_step_post_hook`.
"""

from __future__ import annotations

import warnings
from collections import deque

import torch
from torch import Tensor, nn

CALLS_KEPT = 16  # of count=call: how many forwards may wait for their backward under activation checkpointing
CHANGES_ALLOWED = 3  # of the parameters between two calls of advance(); SAM writes to them once within a step


def advance(model: nn.Module) -> None:
    """Tells every stateful norm layer in `model` that the optimizer has stepped. Without new batches it is idle."""
    for module in model.modules():
        if isinstance(module, Stateful):
            module.advance()


def recomputing() -> bool:
    """Whether this forward is activation checkpointing's second one: it runs inside the backward of the first.

    Compiled code cannot tell, so compile the model that checkpoints; do not checkpoint compiled pieces. Under
    count=step even those are right: a batch that is observed twice leaves the means as they are.
    """
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Stateful(nn.Module):
    """A layer whose state, all of it in buffers, follows the optimizer.

    count="step": a training forward, and its backward, only add their statistics to sums. `advance()` turns the sums
    into means over the tokens of all micro-batches and makes one update of them. In between the state stands still, so
    gradient accumulation sees one state throughout, a recomputed forward equals the first, and a layer may be used
    several times in a graph. The sums are not saved: like gradients, they belong to an unfinished step. Nothing moves
    where nobody calls `advance`; the layer warns when it sees its parameters change without.
    count="call": as the papers' codes do, every training forward (and backward) is an update of its own, so with k
    micro-batches per step warm-ups and schedules run k times faster. Recomputed forwards move nothing and see the state
    of the call that they repeat.
    sync="mean": statistics are means over the tokens of all ranks; "none": each rank has its own, and
    DistributedDataParallel then hands rank 0's buffers to everyone at the next forward.
    Buffers stay in at least float32 when the module is cast to half precision: squares overflow there.

    A leaf names the buffers that its training forward reads (`reads`), calls `expect_statistics` in its constructor,
    `read` and `observe` in a training forward, `observe_gradient` in the backward, and provides `update` and
    `update_gradient`. `leaks`: in training a position's output depends on later positions, so a causal model sees its
    future; `leaks_in_eval`, of any norm layer: in eval too.
    """

    leaks = True
    reads: tuple[str, ...] = ()
    sums: Tensor
    weight_sum: Tensor
    gradient_sums: Tensor
    gradient_weight_sum: Tensor

    def __init__(self, *args, count: str = "step", sync: str = "none", **kwargs):
        super().__init__(*args, **kwargs)
        for key, value, options in (("count", count, ("step", "call")), ("sync", sync, ("none", "mean"))):
            if value not in options:
                raise ValueError(f"norm_layer.{key} is {options[0]} or {options[1]}; got {value!r}")
        self.count, self.sync = count, sync
        self._version, self._changes = -1, 0
        self._calls: deque[tuple[Tensor, list[Tensor]]] = deque(maxlen=CALLS_KEPT)

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        """One step of the state by the forward's statistics (rows, width), with `replace`."""
        raise NotImplementedError

    def update_gradient(self, statistics: Tensor, seen: Tensor, *call: Tensor) -> None:
        """One step of the state by the backward's statistics, for layers that have any; call: as given to observe."""
        raise NotImplementedError

    def expect_statistics(self, rows: int, width: int, *, gradient_rows: int = 0) -> None:
        """Creates the sums of what `observe` and `observe_gradient` will bring. ValueError on a width below 1."""
        if width < 1:
            raise ValueError(f"norm_layer needs at least 1 channel; got width {width}. Check the model's width")
        for prefix, count in (("", rows), ("gradient_", gradient_rows)):
            self.register_buffer(f"{prefix}sums", statistic(count, width), persistent=False)
            self.register_buffer(f"{prefix}weight_sum", statistic(1), persistent=False)  # torch.compile loses a scalar

    @torch.no_grad()
    def read(self, key: Tensor) -> list[Tensor]:
        """Copies of the buffers in `reads`, as this training forward must see them. key: statistics of the batch.

        Copies, since the backward needs them after the buffers have moved.
        """
        if self.count == "call" and torch.compiler.is_compiling():
            # In one graph with the update, the compiler may compute these copies again in the backward, from buffers
            # that have moved.
            torch._dynamo.graph_break()
        state = [getattr(self, name).clone() for name in self.reads]
        if self.count == "step" or torch.compiler.is_compiling():
            return state
        if not recomputing():
            self._calls.append((key.clone(), state))
            return state
        # The call that is repeated had the same statistics. Chosen on the device, without waiting for it.
        keys, states = zip(*reversed(self._calls), strict=True)
        nearest = (torch.stack(keys) - key).abs().sum(1).argmin(0, keepdim=True)
        return [torch.stack(column).index_select(0, nearest)[0] for column in zip(*states, strict=True)]

    @torch.no_grad()
    def observe(self, statistics: Tensor, weight: Tensor) -> None:
        """The statistics (rows, width) of a training forward, means over `weight` tokens; 0 tokens change nothing."""
        if recomputing():
            return
        if self.count == "call":
            self.update(statistics, weight > 0)
            return
        self._check_advanced()
        add(self.sums, self.weight_sum, statistics, weight)

    @torch.no_grad()
    def observe_gradient(self, statistics: Tensor, weight: Tensor, *call: Tensor) -> None:
        """The same for the statistics of a backward; call: what an update under count=call must know of its forward."""
        if self.count == "call":
            self.update_gradient(statistics, weight > 0, *call)
        else:
            add(self.gradient_sums, self.gradient_weight_sum, statistics, weight)

    @torch.no_grad()
    def advance(self) -> None:
        """Under count=step: makes one update of all that was observed since the last, if anything was."""
        self._version, self._changes = -1, 0
        if self.count == "call":
            return
        self.update(self.sums / self.weight_sum, (self.weight_sum > 0).squeeze())
        if len(self.gradient_sums):
            seen = (self.gradient_weight_sum > 0).squeeze()
            self.update_gradient(self.gradient_sums / self.gradient_weight_sum, seen)
        for pending in (self.sums, self.weight_sum, self.gradient_sums, self.gradient_weight_sum):
            pending.zero_()

    def replace(self, name: str, value: Tensor, where: Tensor) -> None:
        """Writes `value` into the buffer where `where` is true: a choice made on the device, without waiting for it."""
        buffer = getattr(self, name)
        buffer.copy_(torch.where(where, value, buffer))

    def _check_advanced(self) -> None:
        """Warns when optimizer steps must have happened, as a parameter was written to again and again, unannounced."""
        parameter = next(self.parameters(), None)
        if parameter is None or torch.compiler.is_compiling():
            return
        self._changes += self._version not in (-1, parameter._version)
        self._version = parameter._version
        if self._changes == CHANGES_ALLOWED + 1:
            warnings.warn(
                f"{type(self).__name__} has norm_layer.count=step, but its parameters keep changing and nobody calls "
                "trainkit.norm_layer.stateful.advance(model) after the optimizer's step, so its statistics stand "
                "still. Call it, or take norm_layer.count=call",
                stacklevel=3,
            )

    def _apply(self, fn, recurse: bool = True):
        """Casts and moves like any module, but keeps buffers in at least float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.is_floating_point() and new.dtype.itemsize < 4:
                self._buffers[name] = old.to(new.device, wide(old.dtype))
        return self


def add(sums: Tensor, weight_sum: Tensor, statistics: Tensor, weight: Tensor) -> None:
    sums.add_(torch.where(weight > 0, statistics * weight, 0.0))
    weight_sum.add_(weight)


def statistic(*shape: int, fill: float = 0.0) -> Tensor:
    """A tensor for a buffer: the default dtype, but at least float32."""
    return torch.full(shape, fill, dtype=wide(torch.get_default_dtype()))


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
