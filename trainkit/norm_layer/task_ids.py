"""Norm layers that must know the task of each sample in a batch, and how they are told."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainkit.norm_layer.channels import over_ranks
from trainkit.norm_layer.stateful import CALLS_KEPT, Stateful, recomputing


def announce(model: nn.Module, task_ids: Tensor | None) -> None:
    """Tells every layer in `model` that asks for it the tasks of the next batch, (B,), int64.

    They hold for forwards in the mode, train or eval, that the model is in. None: nothing is known of the batch.
    """
    said = TaskIds(task_ids, model.training)
    for module in model.modules():
        if isinstance(module, TaskAware):
            module.said = said


class Composition(NamedTuple):
    """What a batch is made of, the same for all layers: counts of each task over all ranks, and what follows.

    counts, log_counts: (tasks,); number: 0-d, of all samples; share: (B, tasks), 1 / counts[t] where the sample's task
    is t, else 0; since: (tasks,), int64: 1 for tasks in the batch, for others the task itself, but at least 1.
    """

    counts: Tensor
    log_counts: Tensor
    number: Tensor
    share: Tensor
    since: Tensor


class TaskIds:
    """The tasks of a batch's samples, shared by all layers of a model; ids: (B,), int64."""

    def __init__(self, ids: Tensor | None, training: bool):
        if ids is not None and (ids.dim() != 1 or ids.is_floating_point()):
            raise ValueError(f"task ids are integers of shape (samples,); got {ids.dtype} of shape {tuple(ids.shape)}")
        self.ids, self.training = ids, training
        self._counts: dict[tuple[int, str], Tensor] = {}
        self._compositions: dict[tuple[int, str, torch.dtype], Composition] = {}

    def counts(self, tasks: int, sync: str) -> Tensor:
        """How many samples of each task the batches of all ranks have, (tasks,), int64; found once per batch.

        ValueError where a task is none of `tasks`, but only on a processor: elsewhere looking would make it wait.
        """
        assert self.ids is not None
        if (tasks, sync) not in self._counts:
            if self.ids.device.type == "cpu" and len(self.ids) and not 0 <= self.ids.min() <= self.ids.max() < tasks:
                raise ValueError(
                    f"task ids must be from 0 to {tasks - 1}, as there are {tasks} tasks; got "
                    f"{self.ids.unique().tolist()}. Set continual.tasks to the stream's number of tasks"
                )
            members = self.ids.unsqueeze(1) == torch.arange(tasks, device=self.ids.device)
            (self._counts[tasks, sync],) = over_ranks(sync, members.sum(0))
        return self._counts[tasks, sync]

    def composition(self, tasks: int, sync: str, dtype: torch.dtype) -> Composition:
        """The batch's composition with numbers in `dtype`; found once per batch, as `counts`."""
        assert self.ids is not None
        key = (tasks, sync, dtype)
        if key not in self._compositions:
            counted = self.counts(tasks, sync)
            counts, order = counted.to(dtype), torch.arange(tasks, device=counted.device)
            share = torch.where(self.ids.unsqueeze(1) == order, 1 / counts.clamp(min=1), 0.0)
            since = torch.where(counted > 0, 1, order.clamp(min=1))
            self._compositions[key] = Composition(counts, counts.log(), counts.sum(), share, since)
        return self._compositions[key]


class TaskAware(Stateful):
    """A layer that `announce` tells the tasks of a batch.

    The announcement holds until the next one. A training forward of another number of samples is refused; one of the
    same number, with tasks that nobody announced, cannot be told from the announced one. A forward that activation
    checkpointing repeats gets the tasks, and with them the state, of the forward that it repeats.
    """

    remembers: tuple[str, ...] = ()  # the buffers that a training forward reads
    said: TaskIds | None
    _past: deque[tuple[int, Tensor, TaskIds | None, list[Tensor]]]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.__dict__.update(self._blank())

    def _blank(self) -> dict[str, Any]:
        """What the layer knows of batches, before the first: attributes that are no part of its state."""
        return {"said": None, "_past": deque(maxlen=CALLS_KEPT)}

    def recall(self, key: Tensor, samples: int) -> tuple[TaskIds | None, list[Tensor]]:
        """The announcement for this training forward, and the buffers in `remembers` as of now; key: of its input.

        None where nothing was announced. ValueError where the announcement is of another number of samples.
        """
        if recomputing():
            past = [call for call in self._past if call[0] == samples]
            return min(past, key=lambda call: float((call[1] - key).abs().sum()))[2:]
        said = self.said if self.said is not None and self.said.training else None
        if said is not None and said.ids is not None and len(said.ids) != samples:
            raise ValueError(
                f"{type(self).__name__} was told the tasks of {len(said.ids)} samples and sees a batch of {samples}. "
                "Call strategy.begin_batch(model, task_ids) before every training forward"
            )
        state = [getattr(self, name) for name in self.remembers]
        if self.count == "call":  # else they stand still until all backwards are done
            state = [buffer.clone() for buffer in state]
        if not torch.compiler.is_compiling():
            self._past.append((samples, key, said, state))
        return said, state

    def __getstate__(self) -> dict[str, Any]:
        """A copy, such as a teacher, starts without announcements: they are not about its batches."""
        return {**self.__dict__, **self._blank()}


def untold(layer: nn.Module) -> ValueError:
    """The error of a training forward whose tasks nobody said."""
    return ValueError(
        f"{type(layer).__name__} needs the task of each sample, and none was announced. "
        "Call strategy.begin_batch(model, task_ids) before every training forward"
    )
