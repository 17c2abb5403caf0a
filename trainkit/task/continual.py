"""Classification on a stream of tasks: the events of the stream, and the accuracy of every task after every other."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.data.task_stream import Stream
from trainkit.launch.console import log
from trainkit.learner.learner import Batch, Learner
from trainkit.learner.learner import Stream as Known
from trainkit.measure.modes import evaluating
from trainkit.task.accuracy_matrix import AccuracyMatrix
from trainkit.task.base import wide
from trainkit.task.classify import Classification


class ContinualClassification(Classification):
    """Cross-entropy over a stream of tasks, class-, task- or domain-incremental.

    Before the first batch of a task, and after the last batch of all, the learner and the strategy are told what has
    ended and what begins, and the network is evaluated on every task it has seen: R[t][k], the accuracy on task k after
    task t, once over all classes and, where tasks have classes of their own, once over those of task k ("task": the
    same logits, all others left out). Both, and the summaries of trainkit/measure/continual.py, are logged; the matrix
    of `scenario` is written to <run>/accuracy_matrix.csv. Validation and test are over all tasks.

    scenario: which of the two is the result; domain: every task has all classes, so there is only the first.
    heads: the classes that compete in scenario=class: all of them, or those seen so far; on a task to come, its own
    too.
    zero_shot: also evaluate the tasks to come, and the untrained network, as forward transfer (fwt) needs.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tasks: int,
        scenario: Literal["class", "task", "domain"] = "class",
        heads: Literal["all", "seen"] = "all",
        zero_shot: bool = False,
        **options: Any,
    ):
        super().__init__(model, **options)
        if scenario not in ("class", "task", "domain"):
            raise ValueError(f"task.scenario is class, task or domain; got {scenario!r}")
        if heads not in ("all", "seen"):
            raise ValueError(f"task.heads is all or seen; got {heads!r}")
        self.scenario, self.heads, self.zero_shot = scenario, heads, zero_shot
        self.matrices = nn.ModuleDict({name: AccuracyMatrix(tasks) for name in ("class", "task")})
        self.begun = self.closed = -1  # the task in progress, and the last one that has ended
        self._restored = False  # whether the learner goes on with what it knew

    # --- the stream -------------------------------------------------------------------------------------------------

    @property
    def data(self) -> Stream:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, Stream):
            raise ValueError("task=continual needs a stream of tasks; try data=split_digits")
        return data

    def setup(self, stage: str) -> None:
        data = self.data
        if data.tasks != self.tasks:
            raise ValueError(f"task.tasks={self.tasks} must be data.tasks={data.tasks}")
        if stage == "fit" and self.trainer.max_epochs not in (None, -1, 1):
            raise ValueError(
                f"a stream passes once through the trainer; for trainer.max_epochs={self.trainer.max_epochs} passes "
                f"over each task say data.epochs={self.trainer.max_epochs}"
            )
        if data.mixed and isinstance(self.learner, Learner) and not self.learner.mixes:
            raise ValueError(
                f"data.mixed=true shuffles all tasks together, which {type(self.learner).__name__} does not expect. "
                "Try learner=joint, or learner=finetune"
            )
        self.classes_of = [data.classes_of(task) for task in range(data.tasks)]
        shared = any(set(self.classes_of[0]) & set(other) for other in self.classes_of[1:])
        if shared and self.scenario != "domain":
            raise ValueError(
                f"task.scenario={self.scenario} needs tasks with classes of their own; these share them. "
                "Try task.scenario=domain"
            )
        if not shared and self.scenario == "domain" and data.tasks > 1:
            raise ValueError("task.scenario=domain needs the same classes in every task; try task.scenario=class")
        if stage == "fit" and isinstance(self.learner, Learner):
            known = Known(
                tasks=data.tasks,
                classes=sum(len(classes) for classes in self.classes_of) if not shared else len(self.classes_of[0]),
                classes_of=self.classes_of,
                transform=data.transform,
                seed=data.seed,
                rank=self.trainer.global_rank,
                world=self.trainer.world_size,
            )
            self.learner.begin(known, self.strategy)

    @property
    def tasks(self) -> int:
        return self.matrices["class"].tasks  # type: ignore[return-value]

    @property
    def milestone(self) -> bool:
        return self.trainer.global_step in self.data.ends()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:  # type: ignore[override]
        self.strategy.begin_batch(model, batch.task_ids)
        return F.cross_entropy(wide(model(batch.x)), batch.labels, label_smoothing=self.label_smoothing)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.begun < 0 or self._restored or not isinstance(self.learner, Learner):
            return
        if not self.learner.joins_late:
            raise ValueError(
                f"{type(self.learner).__name__} needs what it noted at the end of earlier tasks, but the run to be "
                "resumed had another learner. Keep that, or start a new run"
            )
        self.learner.begin_task(self.model, self.begun)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        task = self.data.task_at(self.trainer.global_step)
        if task != self.begun:
            if self.begun < 0 and self.zero_shot:
                self.note_random()
            if self.begun >= 0:
                self.close()
            self.begun = task
            if isinstance(self.learner, Learner):
                self.learner.begin_task(self.model, task)
            self.strategy.begin_task(self.model, task)
        super().on_train_batch_start(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        stepping = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        if not stepping or self.trainer.global_step != self.total_steps:
            return
        if self.trainer.global_step == self.data.ends()[self.begun]:
            self.close()
        else:  # stopped within a task, which a longer run may go on with
            self.evaluate_tasks(self.begun)

    def on_test_start(self) -> None:
        # Of a run that was stopped between its last step and this.
        if self.begun >= 0 and self.trainer.global_step == self.data.ends()[self.begun]:
            with torch.inference_mode(False), torch.enable_grad():
                self.close()

    def close(self) -> None:
        """Ends the task in progress, unless that was done."""
        if self.begun == self.closed:
            return
        task = self.closed = self.begun
        if isinstance(self.learner, Learner):
            self.learner.end_task(self.model, task, self._moved(self.data.training(task)))
        self.strategy.end_task(self.model, task)
        self.evaluate_tasks(task)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["stream"] = {"begun": self.begun, "closed": self.closed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.begun, self.closed = checkpoint["stream"]["begun"], checkpoint["stream"]["closed"]
        self._restored = checkpoint.get("learner", {}).get("of") == type(self.learner).__name__

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate_tasks(self, trained: int) -> None:
        """Row `trained` of the accuracy matrices, and what follows from them."""
        measured = range(self.tasks) if self.zero_shot else range(trained + 1)
        for matrix in self.matrices.values():
            matrix.restart(trained)  # type: ignore[operator]
        for task in measured:
            counts = self.count(task)
            for name, matrix in self.matrices.items():
                matrix.update(trained, task, counts[name], counts["total"])  # type: ignore[operator]
        self.publish(self.summaries())
        self.write_matrix()
        R = self.matrices[self._result].matrix()  # type: ignore[operator]
        row = "  ".join(f"{100 * value:.1f}" for value in R[trained, : trained + 1].tolist())
        how = "has ended" if trained == self.closed else "is left unfinished"
        if self.trainer.is_global_zero:
            log.info("task %d of %d %s; accuracy on each so far, in %%: %s", trained + 1, self.tasks, how, row)

    def note_random(self) -> None:
        """The accuracies of the untrained network."""
        for task in range(self.tasks):
            counts = self.count(task)
            for name, matrix in self.matrices.items():
                matrix.note_random(task, counts[name], counts["total"])  # type: ignore[operator]

    @torch.no_grad()
    def count(self, task: int) -> dict[str, Tensor]:
        """How many of a task's samples are classified rightly on this rank, by matrix, and their number."""
        own = torch.zeros((), dtype=torch.int64, device=self.device)
        right = {"class": own.clone(), "task": own.clone(), "total": own}
        seen = sorted({c for classes in self.classes_of[: max(self.begun, task) + 1] for c in classes})
        with evaluating(self.model):
            for batch in self._moved(self.data.evaluation(task)):
                with self.trainer.precision_plugin.val_step_context():
                    self.strategy.begin_batch(self.model, batch.task_ids)
                    logits = wide(self.model(batch.x))
                competing = only(logits, seen) if self.heads == "seen" else logits
                right["class"] += (competing.argmax(-1) == batch.labels).sum()
                right["task"] += (only(logits, self.classes_of[task]).argmax(-1) == batch.labels).sum()
                right["total"] += len(batch.labels)
        return right

    def summaries(self) -> dict[str, float]:
        """continual/<name> of the scenario's matrix; task_il/<name> beside it where that is another one."""
        values = {f"continual/{k}": v for k, v in self.matrices[self._result].compute().items()}  # type: ignore[operator]
        if self.scenario == "class":
            other = self.matrices["task"].compute()  # type: ignore[operator]
            values |= {f"task_il/{k}": v for k, v in other.items()}
        return {name: float(value) for name, value in values.items()}

    @property
    def _result(self) -> str:
        return "task" if self.scenario == "task" else "class"

    def write_matrix(self) -> None:
        """<run>/accuracy_matrix.csv: a row per task trained, a column per task evaluated; empty where not measured."""
        if not self.trainer.is_global_zero:
            return
        R = self.matrices[self._result].matrix()  # type: ignore[operator]
        with (Path(self.trainer.default_root_dir) / "accuracy_matrix.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["trained", *(f"task_{k}" for k in range(self.tasks))])
            for t, row in enumerate(R.tolist()):
                writer.writerow([t, *("" if value != value else repr(value) for value in row)])

    def evaluate(self, stage: str, batch: Batch) -> None:  # type: ignore[override]
        self.strategy.begin_batch(self.model, batch.task_ids)
        super().evaluate(stage, (batch.x, batch.labels))

    def _moved(self, loader: Any) -> Any:
        """The batches on this process's device."""
        return (self.trainer.strategy.batch_to_device(batch) for batch in loader)


def only(logits: Tensor, classes: list[int]) -> Tensor:
    """The logits with all classes but these at -inf."""
    masked = torch.full_like(logits, -torch.inf)
    masked[:, classes] = logits[:, classes]
    return masked
