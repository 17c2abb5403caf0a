"""What a run says while it trains."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from trainkit.launch.console import log, to_terminal
from trainkit.task.base import Task


class Progress(Callback):
    """One line per logging step and validation:

        step 120/1000  train/loss 2.31  lr 3.0e-04  12.3k tok/s  eta 1:02

    On a terminal the logging steps move a bar instead, and their lines go to the run's log file alone. The time left
    is that of the steps still to do at the speed so far, validation and checkpoints included.
    """

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        to_terminal()
        self.bar: Any = None
        self.unsaid = False  # a logging step has ended, and its metrics come with the next hook
        self.enabled = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self.started, self.first_step = time.perf_counter(), trainer.global_step
        if self.enabled and sys.stdout.isatty():
            self.bar = _bar()
            self.bar.start()
            self.line = self.bar.add_task("", total=pl_module.total_steps, completed=trainer.global_step, said="")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self._say(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.unsaid = pl_module.due
        if self.bar is not None:
            self.bar.update(self.line, completed=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._say(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._evaluated(trainer, pl_module, "val/")

    def on_test_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._evaluated(trainer, pl_module, "test/")

    def on_train_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._say(trainer, pl_module)
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:  # type: ignore[override]
        self._stop()

    def _say(self, trainer: Trainer, task: Task) -> None:
        if not self.enabled or not self.unsaid:
            return
        self.unsaid = False
        said = _training(task.metrics)
        left = self._seconds_left(trainer, task)
        if left is not None:
            said.append(f"eta {duration(left)}")
        text = "  ".join([_step(trainer, task), *said])
        if self.bar is None:
            log.info("%s", text)
        else:
            self.bar.update(self.line, said="  ".join(said))
            _to_file(text)

    def _evaluated(self, trainer: Trainer, task: Task, stage: str) -> None:
        if self.enabled and not trainer.sanity_checking:
            found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(stage)}
            text = "  ".join([_step(trainer, task), *(f"{name} {value:.4g}" for name, value in found.items())])
            if self.bar is None:
                log.info("%s", text)
            else:
                self.bar.console.print(text)
                _to_file(text)

    def _seconds_left(self, trainer: Trainer, task: Task) -> float | None:
        done = trainer.global_step - self.first_step
        if not done:
            return None
        return (time.perf_counter() - self.started) / done * (task.total_steps - trainer.global_step)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _step(trainer: Trainer, task: Task) -> str:
    return f"step {trainer.global_step}/{task.total_steps}" if task.total_steps else f"step {trainer.global_step}"


def _training(metrics: dict[str, float]) -> list[str]:
    """The few numbers of a step that are for reading along."""
    said = [f"train/loss {metrics['train/loss']:.4g}"] if "train/loss" in metrics else []
    if "lr" in metrics:
        said.append(f"lr {metrics['lr']:.1e}")
    if "tokens_per_second" in metrics:
        said.append(f"{thousands(metrics['tokens_per_second'])} tok/s")
    elif "steps_per_second" in metrics:
        said.append(f"{metrics['steps_per_second']:.3g} steps/s")
    return said


def thousands(number: float) -> str:
    """12345 -> 12.3k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def duration(seconds: float) -> str:
    """62 -> 1:02, 3723 -> 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _bar() -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[said]}"))


def _to_file(text: str) -> None:
    for handler in log.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, text, (), None))
