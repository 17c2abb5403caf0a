"""The learning rates that a command line would train with, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from trainkit.launch.check import words
from trainkit.launch.check.composition import options_with
from trainkit.launch.compose import search
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import check_each
from trainkit.schedule.warmup import Schedule

if TYPE_CHECKING:
    from omegaconf import DictConfig


@dataclass(frozen=True)
class Planned:
    """One job's learning rate: `peak` (the optimizer's lr) times `factor`(steps done), over `steps` optimizer steps.

    label: the words that tell the job from the others of the command line.
    """

    label: str
    steps: int
    peak: float
    factor: Schedule
    cfg: DictConfig

    def rate(self, step: int) -> float:
        """What step `step` (from 1, as in the log) is made with."""
        return self.peak * self.factor(step - 1)


def planned(overrides: Sequence[str]) -> list[Planned]:
    """The schedules of the jobs that the words of run.py make, lists of values included (schedule=linear,cosine).

    A key that only some of the chosen schedules have (schedule.decay) counts for those. Raises UserError.
    """
    folders = search(overrides)
    jobs = words.jobs(words.parse(list(overrides), folders))
    options = {word.partition("=")[2] for job in jobs for word in job if word.startswith("schedule=")}

    def counts(word: str, option: str) -> bool:
        name = word.partition("=")[0].lstrip("+")
        having = options_with(name, "schedule", folders) if name.startswith("schedule.") and len(options) > 1 else []
        return option in having or not options & set(having)

    made = []
    for job in jobs:
        option = next((word.partition("=")[2] for word in job if word.startswith("schedule=")), "")
        made.append([word for word in job if counts(word, option)])
    common = set.intersection(*(set(job) for job in jobs))
    labels = [" ".join(word.removeprefix("schedule=") for word in job if word not in common) for job in made]
    return [_plan(cfg, label) for cfg, label in zip(check_each(made), labels, strict=True)]


def _plan(cfg: DictConfig, label: str) -> Planned:
    from hydra.utils import instantiate

    steps = cfg.trainer.max_steps if cfg.trainer.max_steps > 0 else cfg.schedule.get("total")
    if not steps:
        raise UserError(
            f"trainer.max_steps={cfg.trainer.max_steps} leaves the length of the run to the data, which are not read",
            "add trainer.max_steps=N",
        )
    try:
        made: partial[Schedule] = instantiate(deepcopy(cfg).schedule, _convert_="all")
        options: dict[str, Any] = dict(made.keywords)
        factor = made.func(**options | {"total": options.get("total") or steps})
    except ValueError as error:
        raise UserError(*str(error).splitlines()) from error
    optimizer = cfg.optimizer
    while "lr" not in optimizer and "base" in optimizer:  # it steps another one: optimizer=sam
        optimizer = optimizer.base
    return Planned(label or str(cfg.choices.schedule), steps, float(optimizer.get("lr", 1.0)), factor, cfg)
