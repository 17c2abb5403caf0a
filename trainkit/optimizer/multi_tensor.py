"""What the optimizers share: buckets of parameters, and update rules run over lists of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit.measure.shards import is_sharded, local

BLOCK = 1 << 19  # elements: small enough that a few such tensors stay in cache, large enough to be worth a call
COMPILED_BLOCK = 1 << 20  # what a compiled rule reads it reads once; but it may keep temporaries as large as a block
COMPILED_LEAST = 1 << 13  # below that, calling a graph takes longer than what it saves
WINDOW = 1 << 22  # elements: bounds what a method keeps from its first pass over the parameters for its second one
WIDE_WINDOW = 1 << 26  # on an accelerator, which has more to fill
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
        sides = [chosen(p) for p in self.params]
        first, second = ([i for i, is_chosen in enumerate(sides) if is_chosen is side] for side in (True, False))
        return self.pick(first), self.pick(second)

    def pick(self, indices: Sequence[int]) -> Bucket:
        params, gradients = [self.params[i] for i in indices], [self.gradients[i] for i in indices]
        return Bucket(params, gradients, [self.states[i] for i in indices], self.step)

    def windows(self) -> Iterator[Bucket]:
        """A few parameters at a time, at least one: for methods that go over them twice."""
        held: list[int] = []
        size = 0
        for i, p in enumerate(self.params):
            if held and size + p.numel() > (WINDOW if p.device.type == "cpu" else WIDE_WINDOW):
                yield self.pick(held)
                held, size = [], 0
            held.append(i)
            size += p.numel()
        if held:
            yield self.pick(held)


class MultiTensorOptimizer(Optimizer):
    """A torch Optimizer whose step is written for lists of tensors.

    A leaf says which tensors a parameter's state holds (`begin`) and how a bucket of parameters moves (`update`).
    Parameters without a gradient are left as they are, and do not age. State is kept in at least float32, also for
    parameters in half precision. `maximize` turns every gradient round; `compile` compiles the rules (`run`).
    Raises ValueError for a setting out of range, for sparse gradients, and for sharded parameters where the method
    needs whole ones (`whole`).
    """

    whole = False  # True: the method needs whole parameters, not shards
    memory: Tensor | None = None

    def __init__(self, params: Any, defaults: dict[str, Any], *, maximize: bool = False, compile: bool = False):
        check(**defaults)
        # Freed at once, and never written: the C library then keeps blocks of up to this size when they are freed. It
        # else returns the temporaries of every block to the system, and fetching their pages anew costs more than they.
        torch.empty(31 << 20, dtype=torch.uint8, device="cpu")
        super().__init__(params, {**defaults, "maximize": maximize, "compile": compile})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        check(**{key: value for key, value in group.items() if key in self.defaults})
        for p in group["params"]:
            if self.whole and is_sharded(p):
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
        self.update_all([(bucket, group) for group in self.param_groups for bucket in self.buckets(group)])
        return loss

    def update_all(self, found: list[tuple[Bucket, dict[str, Any]]]) -> None:
        """Moves everything. For methods that need a number over all groups first, such as the norm of all gradients."""
        for bucket, group in found:
            self.update(bucket, group)

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

    def temporary(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Uninitialized tensors like these, in at least float32, until the next call.

        On a CPU always in the same memory, which is no part of the state: pages fresh from the system would cost more
        time than all that is written in them.
        """
        shapes, dtype = [local(p) for p in params], wide(params[0].dtype)
        if not all(p.is_cpu and p.is_contiguous() for p in shapes):
            return [torch.empty_like(p, dtype=dtype) for p in shapes]
        sizes = [p.numel() for p in shapes]
        if self.memory is None or self.memory.dtype != dtype or len(self.memory) < sum(sizes):
            self.memory = torch.empty(sum(sizes), dtype=dtype)
        pieces = self.memory[: sum(sizes)].split(sizes)
        return [piece.view(p.shape) for piece, p in zip(pieces, shapes, strict=True)]

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


NOT_NEGATIVE = {"lr", "weight_decay", "eps", "dampening", "delta", "wd_ratio", "lr_decay", "initial_accumulator_value"}
POSITIVE = {"trust_coeff", "max_grad_norm"}


def check(**settings: Any) -> None:
    """Ranges of the settings that most methods have. ValueError names the setting and its range."""
    for name, value in settings.items():
        values = value if name == "betas" else [value]
        if name in NOT_NEGATIVE and not float(value) >= 0:
            raise ValueError(f"optimizer.{name} must not be negative; got {value}")
        if name in POSITIVE and value is not None and not float(value) > 0:
            raise ValueError(f"optimizer.{name} must be positive; got {value}")
        if name in ("betas", "momentum") and not all(0 <= b < 1 for b in values):
            raise ValueError(f"optimizer.{name} must lie in [0, 1); got {value}")


def zeros_like(p: Tensor) -> Tensor:
    """State of p's shape, in at least float32."""
    return torch.zeros_like(p, dtype=wide(p.dtype), memory_format=torch.preserve_format)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def run(
    rule: Rule,
    *lists: Sequence[Tensor],
    now: Mapping[str, float | Tensor] | None = None,
    each: Mapping[str, Sequence[Tensor]] | None = None,
    rows: bool = False,
    reads: bool = False,
    compile: bool = False,
    **settings: Any,
) -> list[list[Any]]:
    """rule(*lists, **each, **now, **settings): a function of parallel lists of tensors, which it changes in place.

    On an accelerator the rule is called once with everything, in multi-tensor kernels. On a CPU it is called with
    blocks of BLOCK elements, so that what one operation writes the next one still finds in the cache: the tensors
    arrive flat, or with rows=True as matrices (rows, the rest) cut between rows; a list may then also hold a column
    (rows, 1) or a vector (rows,) per parameter, which arrives as a column. Half precision is widened to float32 for
    the rule, and the tensors of the first list, the parameters, are rounded once when they are written back; a rule
    that only reads has nothing written back.

    each: further lists, of one 0-d tensor per parameter, which are not cut. now: the numbers that change from step to
    step. A compiled rule gets them as 0-d tensors, or it would be compiled again for every value; so a rule only
    multiplies or divides by them (what it adds, torch makes a constant of the graph).
    Returns, for each tensor, the rule's results for its pieces (a rule may return one value per tensor, such as a sum).
    """
    if not lists[0]:
        return []
    results: list[list[Any]] = [[] for _ in lists[0]]
    half = [values[0].dtype in (torch.float16, torch.bfloat16) for values in lists]
    any_half, now, each = any(half), now or {}, each or {}
    moving = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in now.items()} if compile else {}
    for owners, block, whether in blocks(lists, rows=rows, reads=reads, compile=compile):
        widened = block
        if any_half:
            widened = [[t.float() for t in values] if h else values for values, h in zip(block, half, strict=True)]
        theirs = {name: [values[i] for i in owners] for name, values in each.items()}
        if whether:
            named = *theirs, *moving  # a graph without `clip` is another one
            fast = compiled(rule, kinds(*widened, *theirs.values()), named, tuple(settings.items()))
            returned = fast(*widened, **theirs, **moving, **settings)
        else:
            returned = rule(*widened, **theirs, **now, **settings)
        if half[0] and not reads:
            torch._foreach_copy_(block[0], widened[0])
        if returned is not None:
            for owner, value in zip(owners, returned, strict=True):
                results[owner].append(value)
    return results


def kinds(*lists: Sequence[Tensor]) -> tuple[Any, ...]:
    """What a graph depends on: dtypes, devices, axes, which axes are equally long, and which have length one."""
    tensors = [t for values in lists for t in values]
    sizes = [n for t in tensors for n in t.shape]
    alike = tuple(sizes.index(n) if n > 1 else -1 for n in sizes)
    return *((t.dtype, t.device, t.ndim) for t in tensors), alike


@functools.cache
def compiled(rule: Rule, kinds: tuple[Any, ...], named: tuple[str, ...], settings: tuple[Any, ...]) -> Rule:
    """One graph for all sizes of these kinds of tensors, the keywords that tensors are given by, and these settings.

    Its guards would take longer than a small tensor's update, so they are left out: what they look at is in the key.
    Graphs of one code object are told apart by their guards, so each gets a copy of the rule's.
    """
    copy = FunctionType(rule.__code__.replace(), rule.__globals__, rule.__name__, rule.__defaults__, rule.__closure__)
    copy.__kwdefaults__ = rule.__kwdefaults__
    return torch.compile(copy, dynamic=True, fullgraph=True, options={"guard_filter_fn": lambda gs: [False] * len(gs)})


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


def add(w: Tensors, u: Tensors, rate: float | Tensor) -> None:
    """w <- w + rate u, rate being one of a rule's numbers of `now`."""
    if isinstance(rate, Tensor):
        torch._foreach_add_(w, torch._foreach_mul(u, rate))
    else:
        torch._foreach_add_(w, u, alpha=rate)


def blocks(
    lists: Sequence[Sequence[Tensor]], *, rows: bool, compile: bool, reads: bool = False
) -> Iterator[tuple[list[int], list[list[Tensor]], bool]]:
    """Pieces of parallel lists: whose they are (indices into the lists), the lists of pieces, and whether to compile.

    Not compiled is what torch would make many graphs of (other strides; sizes of one or none) or what is too small.
    """
    laid: list[Sequence[Tensor]] = []
    copies: list[tuple[Tensor, Tensor]] = []  # memory that cannot be seen as a matrix, and what stands for it
    on_cpu = lists[0][0].device.type == "cpu"
    shared: dict[bool, list[int]] = {True: [], False: []}  # parameters that share a block, by whether it is compiled
    held = 0

    def together(indices: list[int]) -> list[list[Tensor]]:
        return [[laid[i][k] for i in indices] for k in range(len(lists))]

    for i, tensors in enumerate(zip(*lists, strict=True)):
        tensors, lies = lay(tensors, rows=rows)
        if rows:
            matrices = [as_rows(t) for t in tensors]
            if not lies:
                pairs = zip(tensors, matrices, strict=True)
                copies += [(t, matrix) for t, matrix in pairs if t.data_ptr() != matrix.data_ptr()]
                lies = contiguous(matrices)
            tensors = matrices
        laid.append(tensors)
        size = tensors[0].numel()
        fits = compile and lies and all(n > 1 for n in tensors[0].shape) and not (on_cpu and size < COMPILED_LEAST)
        most = COMPILED_BLOCK if fits else BLOCK
        if fits:  # of an nn.Parameter, torch would make a graph for its size alone
            laid[i] = tensors = [t.detach() for t in tensors]
        if lies and not rows and (fits or size > most):
            laid[i] = tensors = [t.view(-1) for t in tensors]
        if on_cpu and lies and size > most:
            pieces = min(len(tensors[0]), -(-size // most))
            for piece in zip(*[t.tensor_split(pieces) for t in tensors], strict=True):
                yield [i], [[t] for t in piece], fits
        elif on_cpu and fits:
            yield [i], [[t] for t in tensors], True
        else:
            if on_cpu and held and held + size > most:
                yield shared[False], together(shared[False]), False
                shared[False], held = [], 0
            shared[fits].append(i)
            held += size
    for fits, indices in shared.items():
        if indices:
            yield indices, together(indices), fits
    for t, matrix in () if reads else copies:
        t.copy_(matrix.view(t.shape))


def lay(tensors: Sequence[Tensor], *, rows: bool) -> tuple[Sequence[Tensor], bool]:
    """Parallel tensors with their axes as the first one has them in memory; with rows=True the first axis stays.

    And whether all of them are then contiguous.
    """
    whole = [local(t) for t in tensors]
    if contiguous(whole):
        return whole, True
    p = whole[0]
    axes = [*range(p.ndim)[:rows], *sorted(range(p.ndim)[rows:], key=p.stride, reverse=True)]
    laid = [t.permute(axes) if t.shape == p.shape else t for t in whole]
    return laid, contiguous(laid)


def contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(t.is_contiguous() for t in tensors)


def as_rows(t: Tensor) -> Tensor:
    """(rows, everything else): the filters of a convolution are rows. Vectors are one row per entry."""
    return t.flatten(1) if t.ndim > 1 else t.view(-1, 1)
