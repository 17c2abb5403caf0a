"""What the optimizers share: buckets of parameters, and update rules run over lists of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

BLOCK = 1 << 16  # elements: small enough that a few such tensors stay in cache, large enough to be worth a call
Rule = Callable[..., Any]
Tensors = list[Tensor] | tuple[Tensor, ...]


@dataclass
class Bucket:
    """Parameters of one group that are stepped together: same device, same dtype, same number of steps.

    step: the number of this step, from 1. gradients: as the rule should see them (negated under maximize).
    """

    params: list[Tensor]
    gradients: list[Tensor]
    states: list[dict[str, Any]]
    step: int

    def state(self, name: str) -> list[Tensor]:
        return [state[name] for state in self.states]

    def where(self, chosen: Callable[[Tensor], bool]) -> tuple[Bucket, Bucket]:
        """The parameters that are `chosen`, and the others."""

        def part(side: bool) -> Bucket:
            at = [i for i, p in enumerate(self.params) if chosen(p) is side]
            params, gradients = [self.params[i] for i in at], [self.gradients[i] for i in at]
            return Bucket(params, gradients, [self.states[i] for i in at], self.step)

        return part(True), part(False)


class MultiTensorOptimizer(Optimizer):
    """A torch Optimizer whose step is written for lists of tensors.

    A leaf says which tensors a parameter's state holds (`begin`) and how a bucket of parameters moves (`update`).
    Parameters without a gradient are left as they are, and do not age. State is kept in at least float32, also for
    parameters in half precision. `maximize` turns every gradient round; `compile` compiles the rules (`run`).
    Raises ValueError for a setting out of range, for sparse gradients, and for sharded parameters where the method
    needs whole ones (`whole`).
    """

    whole = False  # True: the method needs whole parameters, not shards

    def __init__(self, params: Any, defaults: dict[str, Any], *, maximize: bool = False, compile: bool = False):
        check(**defaults)
        super().__init__(params, {**defaults, "maximize": maximize, "compile": compile})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check(**{key: value for key, value in group.items() if key in self.defaults})
        for p in group["params"]:
            if self.whole and isinstance(p, DTensor) and not all(at.is_replicate() for at in p.placements):
                raise ValueError(
                    f"{type(self).__name__} needs whole parameters, this one of shape {tuple(p.shape)} is sharded. "
                    "Try trainer=ddp, or optimizer=adamw"
                )

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """Moves the parameters of a bucket, in place."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for bucket in self.buckets(group):
                self.update(bucket, group)
        return loss

    def buckets(self, group: dict[str, Any]) -> Iterator[Bucket]:
        """The parameters of a group that have a gradient; each is one step older afterwards."""
        found: dict[Any, Bucket] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    f"{type(self).__name__} steps dense gradients, this one of shape {tuple(p.shape)} is sparse. "
                    "Try nn.Embedding(sparse=False)"
                )
            state = self.state[p]
            if not state:
                state.update(self.begin(p, group), step=0)
            state["step"] += 1
            bucket = found.setdefault((p.device, p.dtype, state["step"]), Bucket([], [], [], state["step"]))
            bucket.params.append(p)
            bucket.gradients.append(-p.grad if group["maximize"] else p.grad)
            bucket.states.append(state)
        yield from found.values()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)


def keep_dtypes(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """After a load: state in the dtype it was saved in. torch casts it to the parameter's, which loses bits."""
    numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number, p in zip(numbers, params, strict=True):
        for name, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor) and optimizer.state[p][name].dtype != value.dtype:
                optimizer.state[p][name] = value.to(p.device, copy=True)


def check(**settings: Any) -> None:
    """Ranges of the settings that most methods have. ValueError names the setting and its range."""
    for name, value in settings.items():
        if name in ("lr", "weight_decay", "eps") and not float(value) >= 0:
            raise ValueError(f"optimizer.{name} must not be negative; got {value}")
        if name in ("betas", "momentum") and not all(0 <= b < 1 for b in (value if name == "betas" else [value])):
            raise ValueError(f"optimizer.{name} must lie in [0, 1); got {value}")


def zeros_like(p: Tensor) -> Tensor:
    """State of p's shape, in at least float32."""
    return torch.zeros_like(p, dtype=wide(p.dtype), memory_format=torch.preserve_format)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def run(
    rule: Rule,
    *lists: Sequence[Tensor],
    now: dict[str, float] | None = None,
    rows: bool = False,
    compile: bool = False,
    **settings: Any,
) -> list[list[Any]]:
    """rule(*lists, **now, **settings): a rule is a function of parallel lists of tensors, which it changes in place.

    On an accelerator the rule is called once with everything, in multi-tensor kernels. On a CPU it is called with
    blocks of BLOCK elements, so that what one operation writes the next one still finds in the cache: the tensors
    arrive flat, or with rows=True as matrices (rows, the rest) cut between rows. Half precision is widened to float32
    for the rule, and the tensors of the first list, the parameters, are rounded once when they are written back.

    now: the numbers that change from step to step. A compiled rule gets them as 0-d tensors, or it would be compiled
    again for every value; so a rule only multiplies or divides by them.
    Returns, for each tensor, the rule's results for its pieces (a rule may return one value per tensor, such as a sum).
    """
    if not lists[0]:
        return []
    results: list[list[Any]] = [[] for _ in lists[0]]
    half = [values[0].dtype in (torch.float16, torch.bfloat16) for values in lists]
    now = now or {}
    moving = {name: torch.tensor(value, dtype=torch.float64) for name, value in now.items()} if compile else {}
    for owners, block in blocks(lists, rows=rows, whole=compile):
        widened = (
            [[t.float() for t in values] if h else values for values, h in zip(block, half, strict=True)]
            if any(half)
            else block
        )
        if compile and all(size > 1 for values in widened for t in values for size in t.shape):
            kinds = tuple((t.dtype, t.device, t.ndim) for values in widened for t in values)
            returned = compiled(rule, kinds, tuple(settings.items()))(*widened, **moving, **settings)
        else:
            returned = rule(*widened, **now, **settings)
        if half[0]:
            torch._foreach_copy_(block[0], widened[0])
        if returned is not None:
            for owner, value in zip(owners, returned, strict=True):
                results[owner].append(value)
    return results


@functools.cache
def compiled(rule: Rule, kinds: tuple[Any, ...], settings: tuple[Any, ...]) -> Rule:
    """One graph for all sizes of these kinds of tensors and these settings.

    Its guards would take longer than a small tensor's update. What they look at is in the key, and tensors with an
    axis of one or none, for which torch makes graphs of their own, are not given to it.
    """
    return torch.compile(rule, dynamic=True, fullgraph=True, options={"guard_filter_fn": lambda gs: [False] * len(gs)})


def descend(w: Tensors, u: Tensors, lr: float | Tensor, decay: float = 0.0) -> None:
    """w <- (1 - lr decay) w - lr u in one pass, lr being one of a rule's numbers of `now`. May overwrite u."""
    if isinstance(lr, Tensor):  # compiled: fused anyway
        torch._foreach_mul_(w, 1 - lr * decay)
        torch._foreach_mul_(u, lr)
        torch._foreach_sub_(w, u)
    elif w[0].is_cpu and all(t.is_contiguous() for t in (*w, *u)):
        # Plain SGD with L2 on the "gradient" u; the kernel walks the memory of both as it lies.
        options = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "maximize": False, "is_first_step": False}
        torch._fused_sgd_(w, u, [], weight_decay=decay, lr=lr, **options)
    else:
        if decay:
            torch._foreach_mul_(w, 1 - lr * decay)
        torch._foreach_add_(w, u, alpha=-lr)


def blocks(
    lists: Sequence[Sequence[Tensor]], *, rows: bool, whole: bool
) -> Iterator[tuple[list[int], list[list[Tensor]]]]:
    """Pieces of parallel lists: whose they are (indices into the lists), and the lists of pieces."""
    shaped = [[as_rows(t) for t in values] if rows else list(values) for values in lists]
    if lists[0][0].device.type != "cpu":
        yield list(range(len(lists[0]))), shaped
        return
    small: list[int] = []  # parameters that share a block
    held = 0
    for i, tensors in enumerate(zip(*shaped, strict=True)):
        size = tensors[0].numel()
        if whole:
            yield [i], [[t if rows else t.view(-1)] if t.is_contiguous() else [t] for t in tensors]
        elif size > BLOCK and all(t.is_contiguous() for t in tensors):
            flat = tensors if rows else [t.view(-1) for t in tensors]
            pieces = min(len(flat[0]), -(-size // BLOCK))
            for piece in zip(*(t.tensor_split(pieces) for t in flat), strict=True):
                yield [i], [[t] for t in piece]
        else:
            if small and held + size > BLOCK:
                yield small, [[values[j] for j in small] for values in shaped]
                small, held = [], 0
            small.append(i)
            held += size
    if small:
        yield small, [[values[j] for j in small] for values in shaped]


def as_rows(t: Tensor) -> Tensor:
    """(rows, everything else): the filters of a convolution are rows. Vectors are one row per entry."""
    return t.flatten(1) if t.ndim > 1 else t.view(-1, 1)
