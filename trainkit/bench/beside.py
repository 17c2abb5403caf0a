"""A whole run of trainkit and another loop, taking turns in one thread of one process."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger

from trainkit.bench.timing import Step
from trainkit.launch.compose import compose
from trainkit.launch.console import log, to_terminal
from trainkit.launch.job import build_data, build_loggers, build_task, build_trainer, finish_loggers
from trainkit.launch.rundir import Run
from trainkit.task.base import Task


class Beside(Callback):
    """Times a run by intervals of its steps, each beside as many steps of another loop.

    As the first callback of the run it sees a step begin before any other does, so that what callbacks, loggers and
    the trainer do between two steps counts. The other loop is called from there, in the very thread: another thread
    would have another arena of the C library's memory, and its pages would be fetched anew.
    The first `warmup` intervals of both are not kept. `looks` are contexts around one further step of the run each.
    """

    def __init__(
        self,
        other: Step,
        *,
        interval: int,
        rounds: int,
        clock: Callable[[], float],
        warmup: int = 1,
        looks: Sequence[AbstractContextManager[Any]] = (),
    ):
        self.other, self.interval, self.warmup, self.clock = other, interval, warmup, clock
        self.intervals = warmup + rounds
        self._own: list[float] = []
        self._others: list[float] = []
        self._looks = list(looks)
        self._looking: AbstractContextManager[Any] | None = None
        self._taken = 0
        self._since = 0.0

    @staticmethod
    def steps(interval: int, rounds: int, warmup: int = 1, looks: int = 0) -> int:
        """How many steps the run must take; the last one only ends the one before."""
        return interval * (warmup + rounds) + looks + 1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        wait(trainer.strategy.root_device)
        now = self.clock()
        if self._looking is not None:
            self._looking.__exit__(None, None, None)
            self._looking = None
        intervals, left = divmod(self._taken, self.interval)
        if left == 0 and 0 < intervals <= self.intervals:
            self._own.append(now - self._since)
        if intervals >= self.intervals:
            if self._looks:
                self._looking = self._looks.pop(0)
                self._looking.__enter__()
        elif left == 0:
            self._others.append(self._elsewhere(trainer.strategy.root_device))
            self._since = self.clock()
        self._taken += 1

    def _elsewhere(self, device: torch.device) -> float:
        start = self.clock()
        for _ in range(self.interval):
            self.other()
        wait(device)
        return self.clock() - start

    @property
    def seconds(self) -> list[float]:
        """Of a step of the run, by interval."""
        return [value / self.interval for value in self._own[self.warmup :]]

    @property
    def others(self) -> list[float]:
        """Of a step of the other loop, by interval."""
        return [value / self.interval for value in self._others[self.warmup :]]

    def ratio(self) -> dict[str, float]:
        """The run's time to the other's: the median over pairs of neighbours, which a slow moment slows alike."""
        pairs = zip(self.seconds, self.others, strict=True)
        return {
            "ratio": median(a / b for a, b in pairs),
            "seconds_a": median(self.seconds),
            "seconds_b": median(self.others),
        }


def wait(device: torch.device) -> None:
    """For a device that works while Python goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Prepared:
    """A run as `python run.py` makes it, up to its first step."""

    cfg: Any
    data: LightningDataModule
    task: Task
    trainer: Trainer
    loggers: list[Logger]

    def fit(self, beside: Beside) -> None:
        self.trainer.callbacks.insert(0, beside)  # type: ignore[attr-defined]
        self.trainer.loggers = self.loggers
        try:
            self.trainer.fit(self.task, datamodule=self.data)
        finally:
            finish_loggers(self.loggers)


@contextmanager
def prepared(words: Sequence[str]) -> Iterator[Prepared]:
    """A run with these words on its command line, in a folder that is gone afterwards. W&B is kept offline.

    Nothing is evaluated: what is asked is the cost of a step.
    """
    to_terminal()
    with TemporaryDirectory() as folder, quiet(Path(folder)), offline():
        held_out = ["+trainer.limit_val_batches=0", "+trainer.limit_test_batches=0"]
        cfg = compose([*words, *held_out, f"paths.log_dir={folder}/logs"])
        data, task = build_data(cfg), build_task(cfg)
        run = Run(Path(folder, "run"), id="bench", overrides=list(words))
        run.dir.mkdir()
        trainer = build_trainer(cfg, task, run)
        data.trainer = trainer
        yield Prepared(cfg, data, task, trainer, build_loggers(cfg, run, 0))


@contextmanager
def quiet(folder: Path) -> Iterator[None]:
    """Sends the runs' lines to a file, as they have one, and nowhere else."""
    before, handler = log.handlers, logging.FileHandler(folder / "run.log")
    log.handlers = [handler]
    try:
        yield
    finally:
        log.handlers = before
        handler.close()


@contextmanager
def offline() -> Iterator[None]:
    """W&B as on a machine without a key."""
    before = os.environ.get("WANDB_MODE")
    os.environ["WANDB_MODE"] = "offline"
    try:
        yield
    finally:
        os.environ.pop("WANDB_MODE")
        if before is not None:
            os.environ["WANDB_MODE"] = before
