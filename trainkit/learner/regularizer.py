"""What learners without a buffer share: cross-entropy on the new data, and distances to what was learned before."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.learner.learner import Batch, Learner, of_stream
from trainkit.learner.teacher import Teacher, penultimate

CLASSES = ("all", "seen", "new")


@dataclass(frozen=True)
class Forward:
    """A training forward, and that of the network as it was after the last task, without gradient.

    logits, old_logits: (B, K); features, old_features: (B, width), what the last layer is given, None where no distance
    asked for them, as are the old ones; old: the classes of the tasks that have ended.
    """

    logits: Tensor
    features: Tensor | None
    old_logits: Tensor | None
    old_features: Tensor | None
    old: list[int]


class Regularizer(Learner):
    """loss = CE(f(x), y) + weight · distance, the distance from the first finished task on.

    classes: which columns of the logits compete in the cross-entropy: "all" of them, those "seen" so far, or the "new"
    ones, of the tasks that are begun and not finished. A leaf is a learner by itself and can be a term of a sum
    (rehearsal_free): it says what its `distance` is, which outputs of the old network that takes (`wants`: "logits",
    "features"), and what it notes at a task's end (`remember`, `memory`, `load_memory`).

    The old network is a copy in eval mode, with running statistics of its own, outside of optimizer and DDP; it costs a
    forward per batch, sees the same augmented view, and is saved with the run. Parameters are all that a leaf can
    penalize: the running statistics of BatchNorm belong to none, so they drift to the new task under any weight.
    """

    joins_late = False
    name: str
    wants: frozenset[str] = frozenset()

    def __init__(self, *, weight: float = 1.0, classes: Literal["all", "seen", "new"] = "all"):
        if weight < 0:
            raise ValueError(f"learner.weight must not be negative; got {weight}")
        if classes not in CLASSES:
            raise ValueError(f"learner.classes must be one of {', '.join(CLASSES)}; got {classes!r}")
        self.weight, self.classes = weight, classes
        self.task = 0
        self.finished: list[int] = []  # tasks
        self.teacher = Teacher()

    def distance(self, model: nn.Module, forward: Forward) -> Tensor:
        """How far the network has gone from the old one, 0-d; called once a task has ended."""
        raise NotImplementedError

    def remember(self, model: nn.Module, batches: Iterable[Batch], competing: Callable[[Tensor], Tensor]) -> None:
        """Called at a task's end with its training samples; competing: logits -> those of the cross-entropy."""

    def memory(self) -> dict[str, Any]:
        """What `remember` has noted, to be saved."""
        return {}

    def load_memory(self, memory: dict[str, Any]) -> None:
        """Takes back what `memory` gave."""

    def distances(self, model: nn.Module, forward: Forward) -> dict[str, Tensor]:
        """The weighted terms by name."""
        return {self.name: self.weight * self.distance(model, forward)}

    # --- the learner ------------------------------------------------------------------------------------------------

    def __call__(
        self, model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = of_stream(batch)
        old_logits, old_features = self._old(model, batch) if self.finished and self.wants else (None, None)
        with penultimate(model, wanted="features" in self.wants) as features:
            logits = self.logits(model, batch.x, batch.task_ids)
        total = F.cross_entropy(self.competing(logits), batch.labels)
        logged = {"cross_entropy": total}
        if self.finished:
            old = sorted({label for task in self.finished for label in self.stream.classes_of[task]})
            kept = features[0] if features else None
            logged |= self.distances(model, Forward(logits, kept, old_logits, old_features, old))
            total = torch.stack(list(logged.values())).sum()
        return total, logged

    @torch.no_grad()
    def _old(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor | None]:
        teacher = self.teacher.of(model)
        with penultimate(teacher, wanted="features" in self.wants) as features:
            # Not announced: it knows nothing of the task in progress, and speaks as it did when it was made.
            logits = wide(teacher(batch.x))
        return logits, features[0] if features else None

    def competing(self, logits: Tensor) -> Tensor:
        """The logits (…, K) with those of classes that do not compete at -inf."""
        if self.classes == "all":
            return logits
        tasks = [t for t in range(self.task + 1) if self.classes == "seen" or t not in self.finished]
        out = torch.ones(logits.shape[-1], dtype=torch.bool)
        out[[label for task in tasks for label in self.stream.classes_of[task]]] = False
        return logits.masked_fill(out.to(logits.device), -torch.inf)

    def begin_task(self, model: nn.Module, task: int) -> None:
        self.task = task

    def end_task(self, model: nn.Module, task: int, loader: Iterable[Batch]) -> None:
        self.remember(model, loader, self.competing)
        if self.wants:
            self.teacher.take(model)
        self.finished.append(task)

    def state_dict(self) -> dict[str, Any]:
        state = {"task": self.task, "finished": list(self.finished), "memory": self.memory()}
        return state | {"teacher": self.teacher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task, self.finished = state["task"], list(state["finished"])
        self.load_memory(state["memory"])
        self.teacher.load_state_dict(state["teacher"])


# --- parameters -----------------------------------------------------------------------------------------------------


def chosen(model: nn.Module, only: str | None) -> dict[str, nn.Parameter]:
    """The trainable parameters whose names the expression `only` is found in; None: all. ValueError if there are none.

    In the order of their names' first appearance, a shared one once.
    """
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and (only is None or re.search(only, n))}
    if not found:
        names = ", ".join([name for name, _ in model.named_parameters()][:5])
        raise ValueError(f"learner.only={only!r} matches no parameter of the model; names are like {names}")
    return found


def wide(value: Tensor) -> Tensor:
    """In at least float32."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def moved(model: nn.Module, anchor: dict[str, Tensor], importance: dict[str, Tensor] | None = None) -> Tensor:
    """Σ_j F_j (θ_j - θ*_j)², θ* and F by the parameter's name, F = 1 where None."""
    parameters, total = dict(model.named_parameters()), []
    for name in list(anchor):
        square = (wide(parameters[name]) - to(anchor, name, parameters[name])).square()
        total.append((square if importance is None else square * to(importance, name, parameters[name])).sum())
    return torch.stack(total).sum()


def to(values: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """values[name], from now on where `like` is: a checkpoint brings it to the CPU."""
    if values[name].device != like.device:
        values[name] = values[name].to(like.device)
    return values[name]
