"""Parameter roles, and one optimizer per role behind a single face."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit.optimizer.multi_tensor import keep_dtypes
from trainkit.schedule.batch_size import lr_factor

ROLES = ("matrix", "vector", "embed", "head")
WORDS = ("takes", "decay", "rest", "lr_batch_rule", "reference_batch")  # of an optimizer's YAML, for by_role


def role(module: nn.Module, parameter: nn.Parameter) -> str:
    """What `parameter` is to an optimizer: what its module says, else "embed", "matrix" (2 axes or more), "vector"."""
    if parameter.ndim < 2:
        return "vector"
    return getattr(module, "role", None) or ("embed" if isinstance(module, nn.Embedding) else "matrix")


def roles(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter once, by role, in the model's order; a tied weight has its first owner's role."""
    found: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                found.setdefault(role(module, parameter), []).append(parameter)
    return found


def by_role(
    model: nn.Module,
    factory: Callable[..., Optimizer],
    *,
    takes: str | Sequence[str] = "all",
    decay: Sequence[str] = ("matrix", "embed", "head"),
    rest: Callable[..., Optimizer] | None = None,
    lr_batch_rule: str = "none",
    reference_batch: int = 1,
) -> Optimizer:
    """The optimizer of a model: `factory(params)` for the roles in `takes`, `rest(params)` for the others.

    Each role is one param group, with the key "role"; roles outside of `decay` get weight_decay 0. With takes="all"
    this is the plain optimizer, else a Partition. Raises ValueError where a role in `takes` matches no parameter, or
    where parameters are left over and `rest` is not given.
    """
    found = roles(model)
    if not found:
        raise ValueError("the model has no trainable parameter: nothing for optimizer to do")
    words: dict[str, Any] = {"lr_batch_rule": lr_batch_rule, "reference_batch": reference_batch}
    return over_roles(found, factory, takes=takes, decay=decay, rest=rest, **words)


def over_roles(
    found: dict[str, list[nn.Parameter]],
    factory: Callable[..., Optimizer],
    *,
    takes: str | Sequence[str] = "all",
    decay: Sequence[str] = ("matrix", "embed", "head"),
    rest: Callable[..., Optimizer] | None = None,
    lr_batch_rule: str = "none",
    reference_batch: int = 1,
) -> Optimizer:
    """by_role for parameters whose roles are known already."""
    lr_factor(lr_batch_rule, 1, reference_batch)  # refuses what is neither a rule nor a batch
    taken = list(found) if takes == "all" else [takes] if isinstance(takes, str) else list(dict.fromkeys(takes))
    for name in taken:
        if name not in found:
            raise ValueError(f"optimizer.takes names role {name!r}, but the model's parameters are {_counts(found)}")
    left = [name for name in found if name not in taken]
    if not taken:
        raise ValueError(f"optimizer.takes names no role; the model's parameters are {_counts(found)}")
    if left and not rest:
        raise ValueError(
            f"optimizer.takes leaves out the roles {', '.join(left)}: who steps them? Try optimizer/rest=adamw"
        )

    def build(make: Callable[..., Optimizer], names: Iterable[str]) -> Optimizer:
        exempt = {"weight_decay": 0.0}
        rule = {} if lr_batch_rule == "none" else {"lr_batch_rule": lr_batch_rule, "reference_batch": reference_batch}
        made = make([{"params": found[n], "role": n, **rule, **({} if n in decay else exempt)} for n in names])
        for group in made.param_groups:
            if not group["lr"] > 0:
                raise ValueError(f"optimizer.lr must be positive; got {float(group['lr']):g}")
        return made

    first = build(factory, taken)
    if not left or not rest:
        return first
    try:
        return Partition([first, build(rest, left)])
    except ValueError as error:
        raise ValueError(str(error).replace("optimizer.", "optimizer.rest.", 1)) from error


def scale_lr(optimizer: Optimizer, batch: int) -> None:
    """Multiplies each group's learning rate by its rule's factor for steps of `batch` samples."""
    for group in optimizer.param_groups:
        if "lr_batch_rule" in group:
            group["lr"] *= lr_factor(group["lr_batch_rule"], batch, group["reference_batch"])


def split(factory: partial[Optimizer]) -> tuple[Callable[..., Optimizer], dict[str, Any]]:
    """A configured factory without the words that say what it is fed, and those words: (factory, by_role's)."""
    options = dict(factory.keywords)
    words = {k: options.pop(k) for k in WORDS if k in options}
    return partial(factory.func, *factory.args, **options), words


class Partition(Optimizer):
    """Several optimizers over disjoint parameters, stepped as one.

    The children share one state and one list of groups with it, so schedules, hooks, saving and loading see a single
    optimizer. `step` runs the closure once, then each child.
    """

    def __init__(self, children: Sequence[Optimizer]):
        self.children = list(children)
        super().__init__([group for child in self.children for group in child.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for child in self.children:
            child.state, child.param_groups = self.state, [next(groups) for _ in child.param_groups]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        keep_dtypes(self, state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for child in self.children:
            child.step()
        return loss


def _counts(found: dict[str, list[nn.Parameter]]) -> str:
    return ", ".join(f"{name} ({sum(p.numel() for p in ps):,} in {len(ps)})" for name, ps in found.items())


def describe(model: nn.Module) -> str:
    """The trainable parameters by role, for people: `matrix (1,179,648 in 24), vector …`."""
    return _counts(roles(model))
