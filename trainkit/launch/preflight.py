"""Every job is composed and checked before anything heavy is imported and anything is written.

A mistake costs the user one reading of at most three lines: what is wrong, where, and what was probably meant. The
sentences stand beside their checks: the shape of a word in words.py, groups and companions in choices.py, keys and
values in values.py, targets and their keywords in targets.py, and what Hydra or YAML raise in explain.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainkit.launch import rundir
from trainkit.launch.check import words
from trainkit.launch.check.calls import check_calls
from trainkit.launch.check.choices import (
    OVERLAYS,
    check_choice,
    check_companions,
    check_inner,
    check_jobs,
    check_launcher,
    check_rest,
    check_sweep,
)
from trainkit.launch.check.composition import Composition
from trainkit.launch.check.from_run import check_from_run, settled
from trainkit.launch.check.guards import check_guards
from trainkit.launch.check.ranges import check_compile, check_export, check_plan, check_sample
from trainkit.launch.check.targets import allowed, check_parameters, check_plugins, check_targets
from trainkit.launch.check.values import check_missing, check_nodes, check_share, check_top, check_value
from trainkit.launch.compose import assign, choose, is_value, search
from trainkit.launch.explain import UserError, did_you_mean
from trainkit.launch.mode import hparams_search
from trainkit.launch.sources import Folders, default_groups

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

__all__ = ["MODES", "Plan", "UserError", "allowed", "check", "check_config"]

MODES = ("train", "eval", "sample", "convert", "export", "search", "plan")
FROM_RUN = ("eval", "sample", "convert", "export")  # these take the configuration of an earlier run, named by resume=
OF_THE_SWEEP = ("hydra/launcher", "hydra.launcher", "hydra/sweeper", "hydra.sweeper", "hydra.sweep", "sweep.")


@dataclass
class Plan:
    """What a command line asks for: the words and the configuration of each job, all of them checked.

    passthrough: the answer is Hydra's own (--info, --hydra-help, --cfg hydra, ...). launcher: the option of
    hydra/launcher; with "basic" a sweep is ours to run. words: what the jobs were expanded from, by the command line
    that the sweep was first started with; typed: today's. search: the node of hparams_search, None for none; under
    mode=search, which is a sweep too, the only job is what all jobs that are still to be chosen have in common.
    """

    overrides: list[list[str]] = field(default_factory=list)
    configs: list[DictConfig] = field(default_factory=list)
    multirun: bool = False
    passthrough: bool = False
    launcher: str = "basic"
    words: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)
    search: hparams_search.Search | None = None


def check(argv: Sequence[str], *, merged: bool = False) -> Plan:
    """The plan behind a command line. Raises UserError for the first mistake found.

    A run that is to be continued has a configuration of its own, which resume.recorded merges the words with, and
    which they are compared with then (`merged`); until then the plan is as good as the place of that run.
    """
    line = words.read(list(argv))
    if {"hydra_help", "version", "shell_completion"} & set(line.flags):
        return Plan([line.overrides], passthrough=True)
    folders = search(line.overrides)
    parsed = words.parse(line.overrides, folders)
    standing = default_groups()
    searching = any(word.key_or_group == "mode" and word.value() == "search" for word in parsed)
    for word in parsed:
        check_sweep(word, line.multirun, searching and not line.multirun)
        if word.key_or_group == "hydra/launcher":
            check_launcher(word)
        if _is_choice(word, folders):
            _each_option(word, lambda one: check_choice(one, folders, standing))
        if word.key_or_group == "hydra.mode":
            raise UserError(f"{word.input_line}: say -m on the command line for a sweep, and nothing for one job")
    if not (merged or line.multirun or searching or line.for_hydra) and any(
        word.key_or_group == "resume" for word in parsed
    ):
        place = _check_job([w.input_line or "" for w in parsed if _tells_the_place(w)], folders, choose)
        if place.mode == "train" and place.resume:
            return Plan([line.overrides], [place], words=line.overrides, typed=line.overrides)
    jobs = words.jobs(parsed) if line.multirun else [line.overrides]
    compose = _remembering(choose) if line.multirun else choose
    first = _check_job(jobs[0], folders, compose)
    sought = hparams_search.chosen(first, line.multirun)
    added = words.parse(hparams_search.rates(sought, parsed), folders)
    if added:
        jobs = words.jobs([*parsed, *added])
        first = _check_job(jobs[0], folders, compose)
    configs = [first, *(_check_job(job, folders, compose) for job in jobs[1:])]
    for cfg in configs[1:]:
        hparams_search.chosen(cfg, line.multirun)
    sweeping = line.multirun or first.mode == "search"
    launcher = next((str(w.value()) for w in reversed(parsed) if w.key_or_group == "hydra/launcher"), "basic")
    if sweeping:
        check_jobs(first, launcher)
    overrides = [
        settled([word for word in job if not word.lstrip("+~").startswith(OF_THE_SWEEP)], cfg)
        for job, cfg in zip(jobs, configs, strict=True)
    ]
    if sweeping:
        overrides = [hparams_search.of_a_job(job, cfg) for job, cfg in zip(overrides, configs, strict=True)]
    if sought is not None and first.mode == "search":
        hparams_search.check_words(sought, overrides[0], folders, compose)
    return Plan(
        overrides=overrides,
        configs=configs,
        multirun=sweeping,
        passthrough=line.for_hydra,
        launcher=launcher,
        words=line.overrides,
        typed=line.overrides,
        search=sought,
    )


def check_each(jobs: Sequence[Sequence[str]]) -> list[DictConfig]:
    """The configurations of jobs that are given one by one, checked. Raises UserError for the first mistake found."""
    compose = _remembering(choose)
    return [_check_job(list(job), search(job), compose) for job in jobs]


def check_config(cfg: DictConfig, *, plugins: Sequence[str] = ()) -> None:
    """Checks a configuration that was read from a run's directory, which may be somebody else's.

    plugins: the packages that today's user names; what the configuration itself says about plugins counts for
    nothing. Raises UserError.
    """
    job = check_calls(cfg, plugins=plugins)
    check_missing(job)
    check_parameters(job)


def _check_job(job_words: list[str], folders: Folders, compose: Callable[[list[str]], DictConfig]) -> DictConfig:
    parsed = words.parse(job_words, folders)
    values = [word for word in parsed if is_value(word, folders)]
    choices = [word for word in parsed if word not in values]
    try:
        job = Composition(compose([word.input_line or "" for word in choices]), folders, parsed)
    except UserError:
        for word in choices:
            check_inner(word, folders, default_groups() | {word.key_or_group: word.value() for word in choices})
        raise
    from_run = any(word.key_or_group == "mode" and word.value() in FROM_RUN for word in values)
    for word in values:
        group = word.key_or_group.split(".")[0]
        if from_run and group in job.choices and group != "paths":
            continue  # meant for the earlier run's choices; compose.overlay compares it with those
        check_value(word, job)
        assign(job.cfg, word)
    for check_one in (check_mode, check_top, *OWN_NODES) if from_run else CHECKS:
        check_one(job)
    return job.cfg


def check_mode(job: Composition) -> None:
    """The mode exists, and has the run that it works on."""
    mode = job.raw.get("mode")
    if mode not in MODES:
        meant = did_you_mean(str(mode), MODES)
        raise UserError(f"mode={mode}: there is no such mode{meant}", f"modes: {', '.join(MODES)}")
    if mode in FROM_RUN and not job.raw.get("resume"):
        raise UserError(f"mode={mode} works on an earlier run: add resume=DIR, or resume=last for the newest")


def check_name(job: Composition) -> None:
    """Runs stay where they are looked for."""
    if job.resolved.get("name") is not None:
        rundir.home(str(job.resolved["paths"]["log_dir"]), str(job.resolved["name"]))


def check_targets_and_plugins(job: Composition) -> None:
    """A composed configuration is the user's own, so its `plugins` count."""
    plugins = job.resolved["plugins"]
    check_plugins(plugins)
    check_targets(job, plugins)


OWN_NODES = (check_compile, check_sample, check_export, check_plan)
CHECKS = (
    check_mode,
    check_companions,
    check_rest,
    check_nodes,
    check_missing,
    check_top,
    check_name,
    check_targets_and_plugins,
    check_parameters,
    check_guards,
    check_share,
    check_from_run,
    hparams_search.check_search,
    *OWN_NODES,
)


def _tells_the_place(word: Override) -> bool:
    """Whether a word may say which run `resume` means, and where to look for it."""
    top = word.key_or_group.split(".")[0]
    return top in ("resume", "mode", "name", "paths", *OVERLAYS) or word.key_or_group == "hydra.searchpath"


def _is_choice(word: Override, folders: Folders) -> bool:
    return not is_value(word, folders) and not word.is_hydra_override() and word.package is None


def _each_option(word: Override, check_one: Callable[[Override], None]) -> None:
    """Checks each value of a sweep over a group as if it stood alone."""
    from dataclasses import replace

    from hydra.core.override_parser.types import ValueType

    if not word.is_sweep_override():
        check_one(word)
    elif word.is_discrete_sweep():
        for value in word.sweep_iterator():
            check_one(replace(word, _value=value, value_type=ValueType.ELEMENT))


def _remembering(make: Callable[[list[str]], DictConfig]) -> Callable[[list[str]], DictConfig]:
    """`make`, called once for each set of choices: the jobs of a sweep often differ in values only."""
    made: dict[tuple[str, ...], DictConfig] = {}

    def remembered(chosen: list[str]) -> DictConfig:
        key = tuple(chosen)
        if key not in made:
            made[key] = make(chosen)
        return deepcopy(made[key])

    return remembered
