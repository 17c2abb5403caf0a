"""`resume=` without repeating yourself: the words that a run was started with are part of continuing it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainkit.launch import rundir
from trainkit.launch.compose import choose, is_value, search
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import OF_THE_SWEEP, Plan, check, check_each
from trainkit.launch.words import parse

# `plugins` and folders that may set it count only when they are typed: a run directory from elsewhere must not widen
# what may be executed.
TRUSTED = ("plugins", "hydra.searchpath")
TYPED_ONLY = (*TRUSTED, "resume", "mode", "paths.run_dir")
PLACES = ("paths.log_dir", "paths.cache_dir", "paths.run_dir")  # where a sweep is, not what it is


def recorded(plan: Plan) -> Plan:
    """A plan that continues a run or a sweep, with the words of that beside those of the command line, which win."""
    if plan.passthrough:
        return plan
    cfg = plan.configs[0]
    if plan.multirun:
        return _sweep(plan) if cfg.sweep.resume is not None else plan
    if cfg.mode != "train" or not cfg.resume:
        return plan
    shared = os.environ.get(rundir.SHARED_DIR)
    if rundir.rank() > 0 and shared:
        directory = Path(shared)  # rank 0 has found it, and holds it
    else:
        directory = rundir.find(cfg.resume, cfg.paths.log_dir, cfg.name)
        if rundir.rank() == 0:  # under torchrun, which has started the other ranks by itself, it may hold it already
            rundir.check_free(directory)
    result, words = rundir.read_json(directory / "result.json"), plan.overrides[0]
    typed = {key(word) for word in words}
    before = [w for w in result.get("overrides", []) if key(w) not in typed and key(w) not in TYPED_ONLY]
    return check(_without_replaced(before, words, result.get("choices", {})) + words)


def _without_replaced(before: list[str], words: list[str], choices: Mapping[str, Any]) -> list[str]:
    """`before` without the words about options that are not chosen any more: data.path once it is data=hub."""
    if not any(key(word) in choices for word in words):
        return before
    folders = search([*before, *words])
    chosen = [word for word in parse([*before, *words], folders) if not is_value(word, folders)]
    now = choose([word.input_line or "" for word in chosen]).choices
    replaced = {group for group, option in choices.items() if now.get(group) != option}
    return [word for word in before if key(word).split(".")[0] not in replaced]


def _sweep(plan: Plan) -> Plan:
    """The jobs of the sweep that is to be continued. Raises UserError where the command line asks for others."""
    cfg = plan.configs[0]
    directory = rundir.find_sweep(cfg.sweep.resume, cfg.paths.log_dir, cfg.name)
    record = rundir.read_json(directory / "sweep.json")
    jobs, first = [job["overrides"] for job in record.get("jobs", [])], record.get("words", [])
    if not jobs:
        raise UserError(f"{str(directory / 'sweep.json')!r} lists no jobs, so there is nothing to go on with")
    for word in plan.words:
        if not _may_change(word) and word not in first and _of(key(word), plan.overrides) != _of(key(word), jobs):
            there = next((w for w in first if key(w) == key(word)), f"without {key(word)}")
            raise UserError(
                f"sweep.resume={cfg.sweep.resume}: {directory} was started {there}, and {word} was asked for",
                "give it the same words or none; without sweep.resume it is a new sweep",
            )
    today = [word for word in plan.words if _may_change(word)]
    settings = _merged([word for word in first if key(word).startswith("sweep.")], _only(today, "sweep."))
    today = [word for word in today if not word.startswith(OF_THE_SWEEP)]
    jobs = [_merged([word for word in job if key(word) not in TRUSTED], today) for job in jobs]
    return replace(plan, overrides=jobs, configs=check_each([[*job, *settings] for job in jobs]), words=first)


def _may_change(word: str) -> bool:
    return key(word) in (*PLACES, *TRUSTED) or word.startswith(OF_THE_SWEEP)


def _of(name: str, jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """What each job says about a key, jobs that say the same counting once."""
    return [list(said) for said in dict.fromkeys(tuple(w for w in job if key(w) == name) for job in jobs)]


def _only(words: Sequence[str], prefix: str) -> list[str]:
    return [word for word in words if key(word).startswith(prefix)]


def _merged(before: Sequence[str], today: Sequence[str]) -> list[str]:
    """`before` with today's words in the place of those with the same key, and the others behind."""
    by_key = {key(word): word for word in today}
    merged = [by_key.get(key(word), word) for word in before]
    return [*merged, *(word for word in today if word not in merged)]


def key(word: str) -> str:
    """The key that an override sets or deletes."""
    return word.partition("=")[0].lstrip("+~")
