"""The accuracy of every task after every other, counted over batches and ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torchmetrics import Metric

from trainkit.measure.continual import summary


class AccuracyMatrix(Metric):
    """R[t, k] = correct / total on task k after training task t, and what follows from it.

    `compute` gives the numbers of trainkit/measure/continual.py over the tasks trained so far, as shares, without those
    that what was measured does not define (forgetting after the first task, fwt unless tasks to come were evaluated).

    All ranks must `update` alike, each with what it has counted itself: counts are added up over the ranks there and
    then, since a checkpoint holds the state of rank 0 alone. So all ranks hold the whole matrix at any time, it is
    saved whole, and `compute` asks nobody. Counts of the same cell add up.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, tasks: int):
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        if tasks < 1:
            raise ValueError(f"an accuracy matrix needs at least 1 task; got {tasks}")
        self.tasks = tasks
        for name in ("correct", "total"):  # (T + 1, T): the last row is the untrained network's
            counts = torch.zeros(tasks + 1, tasks, dtype=torch.int64)
            self.add_state(name, counts, dist_reduce_fx="sum", persistent=True)

    def update(self, trained: int, evaluated: int, correct: Tensor | int, total: Tensor | int) -> None:
        """Adds how many of `total` samples of task `evaluated` were classified rightly after task `trained`, 0-d."""
        self._add(self._task(trained), evaluated, correct, total)

    def restart(self, trained: int) -> None:
        """Forgets row `trained`, which is measured once more: a run stopped within a task may go on with it."""
        for counts in (self.correct, self.total):
            counts[self._task(trained)] = 0

    def note_random(self, evaluated: int, correct: Tensor | int, total: Tensor | int) -> None:
        """The same for the untrained network."""
        self._add(self.tasks, evaluated, correct, total)

    def matrix(self) -> Tensor:
        """R, (T, T), float64 on the CPU; NaN where nothing was measured."""
        return self._shares()[:-1]

    def random(self) -> Tensor:
        """The untrained network's accuracies, (T,), NaN where they were not measured."""
        return self._shares()[-1]

    def compute(self) -> dict[str, Tensor]:
        trained = self.total[:-1].sum(1).nonzero().flatten().tolist()
        if not trained:
            return {}
        last = trained[-1]
        so_far = slice(0, last + 1)
        samples = self.total[last, so_far].cpu()
        return summary(self.matrix()[so_far, so_far], self.random()[so_far], samples)

    def _add(self, row: int, evaluated: int, correct: Tensor | int, total: Tensor | int) -> None:
        counts = torch.stack([torch.as_tensor(n, device=self.total.device).long() for n in (correct, total)])
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        evaluated = self._task(evaluated)
        self.correct[row, evaluated] += counts[0]
        self.total[row, evaluated] += counts[1]

    def _task(self, number: int) -> int:
        if not 0 <= number < self.tasks:
            raise ValueError(f"tasks are numbered from 0 to {self.tasks - 1}; got {number}. Check data.tasks")
        return number

    def _shares(self) -> Tensor:
        correct, total = (counts.cpu().double() for counts in (self.correct, self.total))
        return torch.where(total > 0, correct / total, torch.nan)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}total")
        if saved is not None and saved.shape != self.total.shape:
            raise ValueError(
                f"the checkpoint's accuracy matrix is of {saved.shape[1]} tasks, this run's of {self.tasks}. Resume "
                f"with data.tasks={saved.shape[1]}, or start a new run"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
