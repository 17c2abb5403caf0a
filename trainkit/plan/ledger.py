"""Operations on tensors that have shapes and no memory, and the bytes that real ones would hold."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FLOPS = dict(flop_registry)
FLOPS |= {aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
for _suffix in ("", "_backward"):  # torch counts the kernels of a GPU; that of the CPU multiplies the same matrices
    _known = flop_registry[getattr(aten, f"_scaled_dot_product_flash_attention{_suffix}")]
    FLOPS[getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{_suffix}")] = _known
ADDRESS = "Accessing the data pointer of FakeTensor"  # which optimizers compare; imitations have none, so never equal


@dataclass
class Stretch:
    """What happened between two marks: bytes held at its start, at most, and at its end, and the FLOPs within.

    casts: bytes of copies of parameters in another dtype, which autocast makes.
    """

    name: str
    start: int
    peak: int
    end: int
    flops: int = 0
    casts: int = 0


class Ledger(TorchDispatchMode):
    """Counts every storage from the operation that makes it to the moment when nothing refers to it any more.

    live, peak: bytes. `mark` begins a new stretch. What an operation needs inside of itself is not seen; a number read
    out of a tensor, which has none, is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.stretches = [Stretch("", 0, 0, 0)]
        self._held: dict[int, tuple[int, Any]] = {}  # by storage: its bytes, and the reference that tells its end

    @property
    def peak(self) -> int:
        """The most bytes since the last mark."""
        return self.stretches[-1].peak

    def mark(self, name: str) -> None:
        self.stretches[-1].end = self.live
        self.stretches.append(Stretch(name, self.live, self.live, self.live))

    def stretch(self, name: str) -> Stretch | None:
        """The last one of this name, ended."""
        self.stretches[-1].end = self.live
        return next((one for one in reversed(self.stretches) if one.name == name), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else 1
        out = func(*args, **kwargs)
        now = self.stretches[-1]
        counts = FLOPS.get(func._overloadpacket)
        if counts is not None:
            now.flops += counts(*args, **kwargs, out_val=out)
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                size = self._note(t.untyped_storage())
                if size and func is aten._to_copy.default and isinstance(args[0], nn.Parameter):
                    now.casts += size
        return out

    def _note(self, storage: torch.UntypedStorage) -> int:
        """The bytes of a storage that was not there before, else 0."""
        key = storage._cdata
        if key in self._held:
            return 0
        size = storage.nbytes()
        self._held[key] = size, weakref.ref(storage, lambda _: self._free(key))
        self.live += size
        now = self.stretches[-1]
        now.peak = max(now.peak, self.live)
        return size

    def _free(self, key: int) -> None:
        self.live -= self._held.pop(key)[0]


@contextmanager
def imitating() -> Iterator[Ledger]:
    """Inside, tensors have no memory and operations only shapes; real tensors that are met are taken for their shapes.

    What functions remember of the imitations (functools.cache) is forgotten before and after.
    """
    _forget()
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
            warnings.filterwarnings("ignore", message=ADDRESS)
            yield ledger
    finally:
        _forget()


def _forget() -> None:
    leaves = tuple(f"trainkit.{kind}." for kind in ("model", "norm", "norm_layer", "optimizer", "gradient", "measure"))
    for name, module in list(sys.modules.items()):
        if name.startswith(leaves):
            for value in list(vars(module).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()


def imitate(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives every parameter and buffer a twin without memory, on the CPU; call inside `imitating`.

    dtype: of floating-point ones; None: their own. Tied weights stay tied.
    """
    twins: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    if t not in twins:
                        twins[t] = twin(t, dtype)
                    tensors[name] = twins[t]  # type: ignore[assignment]


def twin(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the same shape and strides, a parameter if `t` is one."""
    kind = dtype if dtype is not None and t.is_floating_point() else t.dtype
    made = torch.empty_strided(t.shape, t.stride(), dtype=kind, device="cpu")
    return nn.Parameter(made, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else made


def storages(value: Any) -> dict[Any, int]:
    """The bytes of every storage that the tensors in nested dicts, lists and tuples lie in; views count it in full."""
    found: dict[Any, int] = {}
    for t in _tensors(value):
        local = getattr(t, "_local_tensor", t)  # of a sharded one, the part that lies here
        storage = local.untyped_storage()
        found[local.device, storage._cdata] = storage.nbytes()
    return found


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
