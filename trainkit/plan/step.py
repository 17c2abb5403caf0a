"""What one forward and backward pass holds, measured segment by segment: what is before the blocks, each, the rest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from trainkit.measure.blocks import blocks
from trainkit.plan.ledger import Ledger, imitate, imitating, storages

ENOUGH = 2  # blocks of one kind that are measured; the last one stands for all further ones
FIRST, LAST = "first", "last"


@dataclass(frozen=True)
class Segment:
    """A part of the network. Bytes, unless said otherwise.

    kept: what its forward leaves for the backward, its output included, `output`. forward, backward: the most that is
    held on top of what was there when each began; the backward's includes the gradients that it makes, `gradients`.
    casts: copies of weights in another dtype within `kept`. bare: the most of a block's forward that leaves nothing for
    a backward, as under activation checkpointing. flops: of both passes.
    """

    name: str
    kept: int
    forward: int
    backward: int
    output: int
    gradients: int
    casts: int
    bare: int
    flops: int

    def scaled(self, other: Segment, share: float) -> Segment:
        """This one at another batch size: share 0 is this one, 1 the `other`; sizes grow linearly in between."""
        numbers = {k: round(v + share * (getattr(other, k) - v)) for k, v in vars(self).items() if k != "name"}
        return replace(self, **numbers)


@dataclass(frozen=True)
class Pass:
    """first: from the batch to the first block; blocks; last: head and loss. batch: bytes of the batch itself."""

    first: Segment
    blocks: list[Segment]
    last: Segment
    batch: int

    @property
    def segments(self) -> list[Segment]:
        return [self.first, *self.blocks, self.last]

    @property
    def flops(self) -> int:
        return sum(segment.flops for segment in self.segments)

    def scaled(self, other: Pass, share: float) -> Pass:
        pairs = zip(self.segments, other.segments, strict=True)
        first, *middle, last = [mine.scaled(theirs, share) for mine, theirs in pairs]
        return Pass(first, middle, last, round(self.batch + share * (other.batch - self.batch)))


def measure_pass(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Callable[[], Any],
    *,
    dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
) -> Pass:
    """Imitates a pass of `loss(model, batch())` and its backward. The model is used up: it has no weights afterwards.

    batch is called where tensors have no memory. dtype: of the weights; autocast: the dtype of mixed precision. Of
    blocks with the same modules two are measured, so the time does not grow with the depth. A model without `blocks`
    is one segment, the last.
    """
    kinds, stand_ins = shorten(model)
    with imitating() as ledger:
        imitate(model, dtype)
        given = batch()
        size = sum(storages(given).values())
        outputs: dict[str, int] = {}
        hooks = _marks(ledger, model, outputs)
        mixed: AbstractContextManager[Any] = torch.autocast("cpu", autocast) if autocast else nullcontext()
        ledger.mark(f"forward {FIRST}" if stand_ins else f"forward {LAST}")
        with mixed:
            value = loss(model, given)
        ledger.mark(f"backward {LAST}")
        value.backward()
        ledger.mark("end")
        for hook in hooks:
            hook.remove()
        names = [FIRST, *(str(i) for i in range(len(stand_ins))), LAST]
        found = {name: _segment(ledger, name, outputs.get(name, 0)) for name in names}
    middle = [replace(found[str(stand_ins[i])], name=name) for name, i in kinds.items()]
    return Pass(found[FIRST], middle, found[LAST], size)


def shorten(model: nn.Module) -> tuple[dict[str, int], list[int]]:
    """Leaves two blocks of each kind in the model.

    Returns which entry of the second list stands for each of the blocks there were, by name; the entries are the
    places of those that are left.
    """
    found = blocks(model)
    if not found:
        return {}, []
    left: list[nn.Module] = []
    of_kind: dict[Any, list[int]] = {}
    kinds: dict[str, int] = {}
    for name, block in found.items():
        mine = of_kind.setdefault(_kind(block), [])
        if len(mine) < ENOUGH:
            mine.append(len(left))
            left.append(block)
        kinds[name] = mine[-1]
    model.blocks = nn.ModuleList(left)
    return kinds, list(range(len(left)))


def _kind(block: nn.Module) -> Any:
    """Equal for blocks that are made of the same modules with parameters of the same sizes."""
    modules = tuple((name, type(module).__qualname__) for name, module in block.named_modules())
    return modules, tuple((name, t.shape, t.dtype) for name, t in block.named_parameters())


def _marks(ledger: Ledger, model: nn.Module, outputs: dict[str, int]) -> list[Any]:
    """Hooks that begin a stretch of the ledger wherever a segment's forward or backward begins."""
    hooks: list[Any] = []
    names = [str(i) for i in range(len(blocks(model)))]

    def once(name: str, stream: Any) -> None:
        """Before the backward of what made `stream`."""
        begun: list[bool] = []

        def begin(gradient: Tensor) -> None:
            if not begun:
                ledger.mark(f"backward {name}")
            begun.append(True)

        for t in tree_leaves(stream):
            if isinstance(t, Tensor) and t.requires_grad:
                t.register_hook(begin)

    for i, block in enumerate(blocks(model).values()):

        def before(block: nn.Module, args: Any, i: int = i) -> None:
            if i == 0:
                outputs[FIRST] = sum(storages(args).values())
                once(FIRST, args)
            ledger.mark(f"bare {i}")
            with torch.no_grad():
                block.forward(*args)
            torch.clear_autocast_cache()  # copies of weights that were made without a graph must not be used with one
            ledger.mark(f"forward {i}")

        def after(_: nn.Module, args: Any, output: Any, i: int = i) -> None:
            outputs[str(i)] = sum(storages(output).values())
            once(str(i), output)
            if i == len(names) - 1:
                ledger.mark(f"forward {LAST}")

        hooks += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    return hooks


def _segment(ledger: Ledger, name: str, output: int) -> Segment:
    ahead, back = ledger.stretch(f"forward {name}"), ledger.stretch(f"backward {name}")
    numbers = {"kept": 0, "forward": 0, "backward": 0, "casts": 0, "bare": 0, "flops": 0, "gradients": 0}
    if ahead is not None:
        numbers |= {"kept": ahead.end - ahead.start, "forward": ahead.peak - ahead.start, "casts": ahead.casts}
        numbers["flops"] = ahead.flops
    bare = ledger.stretch(f"bare {name}")
    if bare is not None:
        numbers["bare"] = bare.peak - bare.start
    if back is not None:
        numbers["backward"] = back.peak - back.start
        numbers["flops"] += back.flops
        numbers["gradients"] = max(0, back.end - back.start + numbers["kept"])
    return Segment(name, output=output, **numbers)
