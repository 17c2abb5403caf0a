"""SAM: the step that lowers the loss in a whole neighbourhood (Foret et al., ICLR 2021, arXiv:2010.01412)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from math import isfinite
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainkit.measure.shards import is_sharded
from trainkit.optimizer.multi_tensor import run, wide
from trainkit.optimizer.partition import over_roles, split


class SAM(Optimizer):
    """W̃ = W + ρ/(N + 1e-12) · g, then `base` steps from W with the gradient at W̃; N = ‖g‖ over all parameters.

    adaptive=True (ASAM, Kwon et al., ICML 2021, arXiv:2102.11600, element-wise): W̃ = W + ρ/(N + 1e-12) · W² · g with
    N = ‖|W| · g‖, which does not care how layers are scaled; ρ is 10 times larger or more. W returns from a copy, so
    exactly; decay, momentum and all else of the base act at W. Finds flat minima, for two gradients per step.
    State: the base's and the copy, 4 bytes per parameter, whose memory is kept. state_dict is the base's alone.

    params: tensors, or groups; groups with a "role" (trainkit.optimizer.partition) are handed to the base by its own
    `takes`, `decay` and `rest`. base: params -> Optimizer. step needs a closure that zeroes the gradients, computes
    them and returns the loss of the first pass. again: what makes the second gradient where the closure cannot be
    called twice; None means the closure. Under data parallelism g is what the closure leaves: with DDP the average of
    all ranks, so W̃ is the same everywhere and the step that of one process with the whole batch; the paper perturbs
    each worker by its own gradient. In bfloat16 weights, ρ-sized changes may be lost in rounding.
    """

    def __init__(self, params: Any, base: Callable[..., Optimizer], *, rho: float = 0.05, adaptive: bool = False):
        if not (rho >= 0 and isfinite(rho)):
            raise ValueError(f"optimizer.rho must not be negative; got {rho}. Try 0.05, or 0 for the base alone")
        groups = list(params)
        if groups and all(isinstance(group, dict) and "role" in group for group in groups):
            factory, words = split(base if isinstance(base, partial) else partial(base))
            self.base = over_roles({group["role"]: group["params"] for group in groups}, factory, **words)
        else:
            self.base = base(groups)
        self.rho, self.adaptive = rho, adaptive
        self.again: Callable[[], Any] | None = None
        self._copies: dict[Tensor, Tensor] = {}
        super().__init__(self.base.param_groups, {})
        for p in self._params():
            if is_sharded(p):
                raise ValueError(
                    f"SAM needs whole parameters, this one of shape {tuple(p.shape)} is sharded. "
                    "Try trainer=ddp, or the base optimizer alone"
                )
        self._share()

    def _share(self) -> None:
        """State and groups are the base's own, so schedules, hooks and saving see it."""
        self.state, self.param_groups, self.defaults = self.base.state, self.base.param_groups, self.base.defaults

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base.load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        if closure is None:
            raise ValueError(
                "SAM takes a second gradient at other weights, so step needs a closure: optimizer.step(closure), where "
                "closure() zeroes the gradients, calls backward and returns the loss. With trainer.precision=16-mixed "
                "there is none: take bf16-mixed or 32-true"
            )
        with torch.enable_grad():
            loss = closure()
        with self._perturbed(), torch.enable_grad():
            (self.again or closure)()
        self.base.step()
        return loss

    @contextmanager
    def _perturbed(self) -> Iterator[None]:
        """Inside, the weights are W̃; afterwards W again, also when the second pass fails or is interrupted."""
        pairs: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}  # weights and gradients of one device and dtype
        for p in self._params():
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise ValueError(
                        f"SAM steps dense gradients, this one of shape {tuple(p.shape)} is sparse. "
                        "Try nn.Embedding(sparse=False)"
                    )
                ws, gs = pairs.setdefault((p.device, p.dtype), ([], []))
                ws.append(p)
                gs.append(p.grad)
        kept = [[self._copy(w) for w in ws] for ws, _ in pairs.values()]
        for (ws, _), copies in zip(pairs.values(), kept, strict=True):
            torch._foreach_copy_(copies, ws)
        try:
            self._ascend(list(pairs.values()))
            yield
        finally:
            for (ws, _), copies in zip(pairs.values(), kept, strict=True):
                torch._foreach_copy_(ws, copies)

    def _copy(self, w: Tensor) -> Tensor:
        """Room for a copy; taking it from the system anew at every step would cost more than all the rest here."""
        copy = self._copies.get(w)
        if copy is None or copy.device != w.device or copy.dtype != w.dtype:
            copy = self._copies[w] = torch.empty_like(w)
        return copy

    def _ascend(self, pairs: list[tuple[list[Tensor], list[Tensor]]]) -> None:
        found = [run(lengths, *pair, adaptive=self.adaptive) for pair in pairs]
        norms = [norm for results in found for pieces in results for norm in pieces]
        if not norms:
            return
        widest = reduce(torch.promote_types, (norm.dtype for norm in norms))
        norm = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device, widest) for norm in norms]))
        for ws, gs in pairs:
            factor = (self.rho / (norm + 1e-12)).to(ws[0].device, wide(ws[0].dtype))
            run(climb, ws, gs, factor=factor, adaptive=self.adaptive)

    def _params(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])


def lengths(w: list[Tensor], g: list[Tensor], *, adaptive: bool) -> list[Tensor]:
    """‖g‖, or ‖|W| g‖, of each."""
    return list(torch._foreach_norm(torch._foreach_mul(w, g) if adaptive else g))


def climb(w: list[Tensor], g: list[Tensor], *, factor: Tensor, adaptive: bool) -> None:
    e = g
    if adaptive:
        e = torch._foreach_mul(g, w)
        torch._foreach_mul_(e, w)
    if w[0].is_cpu:  # no device to wait for, and one pass less
        torch._foreach_add_(w, e, alpha=float(factor))
    else:
        torch._foreach_add_(w, torch._foreach_mul(e, factor))
