"""`resume=` without repeating yourself: the words that a run was started with are part of continuing it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainkit.launch import rundir
from trainkit.launch.check.words import of_a_launcher, parse, quoted
from trainkit.launch.compose import choose, is_value, search
from trainkit.launch.explain import UserError
from trainkit.launch.mode import hparams_search
from trainkit.launch.preflight import OF_THE_SWEEP, Plan, check, check_each
from trainkit.launch.process.launched import mark, requeued

# `plugins` and folders that may set it count only when they are typed: a run directory from elsewhere must not widen
# what may be executed.
TRUSTED = ("plugins", "hydra.searchpath")
TYPED_ONLY = (*TRUSTED, "resume", "mode", "paths.run_dir")
PLACES = ("paths.log_dir", "paths.cache_dir", "paths.run_dir")  # where a sweep is, not what it is


def recorded(plan: Plan) -> Plan:
    """A plan that continues a run or a sweep, with the words of that beside those of the command line, which win.

    That is the one which `resume` or `sweep.resume` names; or, in a job that SLURM has put back into its queue and
    started again, the one which this command line began in that job.
    """
    if plan.passthrough:
        return plan
    cfg = plan.configs[0]
    if plan.multirun:
        found = _begun(plan, "sweep.json") if cfg.sweep.resume in (None, "last") else None
        if found is not None:
            plan, cfg.sweep.resume = replace(plan, words=_named(plan.words, "sweep.resume", found)), str(found)
        return _sweep(plan) if cfg.sweep.resume is not None else plan
    if cfg.mode != "train":
        return plan
    shared, words = os.environ.get(rundir.SHARED_DIR), plan.overrides[0]
    if rundir.rank() > 0 and shared:
        if not cfg.resume:
            return plan  # rank 0, which started this process, has put everything into its words
        directory = Path(shared)  # rank 0 has found it, and holds it
    else:
        found = _begun(plan, "result.json") if cfg.resume in (None, "last") else None
        if found is not None:
            words = _named(words, "resume", found)
        elif not cfg.resume:
            return plan
        directory = found or rundir.find(cfg.resume, cfg.paths.log_dir, cfg.name)
        if rundir.rank() == 0:  # under torchrun, which has started the other ranks by itself, it may hold it already
            rundir.check_free(directory)
    result = rundir.read_json(directory / "result.json")
    before = [w for w in result.get("overrides", []) if key(w) not in TYPED_ONLY and not _replaces(words, w)]
    merged = check(_without_replaced(before, words, result.get("choices", {})) + words, merged=True)
    return replace(merged, typed=plan.typed)


def _begun(plan: Plan, record: str) -> Path | None:
    """What this SLURM job has begun by the same command line before it was requeued; None where there is nothing."""
    cfg, mine = plan.configs[0], mark(plan.typed)
    if not requeued():
        return None
    if cfg.paths.run_dir:
        places = [Path(cfg.paths.run_dir).expanduser() / record]
    else:
        root = rundir.home(cfg.paths.log_dir, cfg.name) if cfg.name else Path(cfg.paths.log_dir)
        places = list(root.rglob(record))
    found = [(rundir.read_json(path), path.parent) for path in places]
    found = [(r, d) for r, d in found if r.get("slurm") == mine and (rundir.is_run(d) or rundir.is_sweep(d))]
    # A script may have the same line twice: what is half done comes first.
    newest = max(found, key=lambda f: (f[0].get("status") != "finished", f[0].get("started", 0)), default=None)
    return newest and newest[1]


def _named(words: Sequence[str], name: str, directory: Path) -> list[str]:
    """`words` with the directory as the value of `name`."""
    return [*(word for word in words if key(word) != name), f"{name}={quoted(str(directory))}"]


def _replaces(words: Sequence[str], old: str) -> bool:
    """Whether one of `words` says all about the key of a recorded one.

    A key that the recorded word adds is still to be added where today's sets or deletes it.
    """
    return any(key(word) == key(old) and (old[0] != "+" or word[0] == "+") for word in words)


def _without_replaced(before: list[str], words: list[str], choices: Mapping[str, Any]) -> list[str]:
    """`before` without the words about options that are not chosen any more: data.path once it is data=hub."""
    if not any(key(word) in choices for word in words):
        return before
    folders = search([*before, *words])
    said = {word.key_or_group: str(word.value()) for word in parse(words, folders) if not is_value(word, folders)}
    other = {group for group, option in choices.items() if said.get(group, str(option)) != str(option)}
    before = [word for word in before if not _is_within(word, other)]  # optimizer/base=x goes with its optimizer=sam
    chosen = [word for word in parse([*before, *words], folders) if not is_value(word, folders)]
    now = choose([word.input_line or "" for word in chosen]).choices
    replaced = {group for group, option in choices.items() if now.get(group) != option}
    return [word for word in before if not _is_within(word, replaced)]


def _is_within(word: str, groups: Collection[str]) -> bool:
    """Whether a word is about one of the groups: optimizer, optimizer.lr and optimizer/base about optimizer."""
    spot = key(word).replace("/", ".")
    return any(f"{spot}.".startswith(f"{group.replace('/', '.')}.") for group in groups)


def _sweep(plan: Plan) -> Plan:
    """The jobs of the sweep that is to be continued. Raises UserError where the command line asks for others."""
    cfg = plan.configs[0]
    directory = rundir.find_sweep(cfg.sweep.resume, cfg.paths.log_dir, cfg.name)
    record = rundir.read_json(directory / "sweep.json")
    search, first = _search(plan, directory, record), record.get("words", [])
    jobs = [record["base"]] if "base" in record else [job["overrides"] for job in record.get("jobs", [])]
    launcher = [word for word in first if of_a_launcher(word) and word != "hydra/launcher=basic"]
    if launcher and "hydra/launcher" not in map(key, plan.typed):
        # Not taken over: a launcher runs what its settings say, and the directory may be somebody else's.
        raise UserError(
            f"sweep.resume={cfg.sweep.resume}: {directory} was started with {' '.join(launcher)}",
            "say it again to go on with it, or hydra/launcher=basic to go on with its jobs without",
        )
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
    today = [word for word in today if not word.lstrip("+~").startswith(OF_THE_SWEEP)]
    jobs = [_merged([word for word in job if key(word) not in TRUSTED], today) for job in jobs]
    configs = check_each([[*job, *settings] for job in jobs])
    return replace(plan, overrides=jobs, configs=configs, words=first, search=search)


def _search(plan: Plan, directory: Path, record: Mapping[str, Any]) -> hparams_search.Search | None:
    """What the sweep looks for, as it was started with; a search may be given another number of trials."""
    search, now = record.get("search"), plan.search or {}
    if plan.configs[0].mode == "search" and "base" not in record:
        raise UserError(f"{directory} is a sweep, no search; go on with it: python run.py -m sweep.resume={directory}")
    word = hparams_search.changed(search or {}, now, plan.typed)
    if word is not None:
        raise UserError(
            f"{directory} was started otherwise than with {word}",
            "give it the same words or none; without sweep.resume it is a new one",
        )
    if search is None or "base" not in record:
        return search
    hparams_search.check_installed()
    if any(key(word) == "hparams_search.trials" for word in plan.typed):
        search = {**search, "trials": now["trials"]}
    hparams_search.check_node(search)
    keys = set(hparams_search.entries(search))
    if any(set(job.get("params", {})) != keys for job in record["jobs"]):
        raise UserError(f"{str(directory / 'sweep.json')!r} is damaged: a job lacks the values of its space")
    return search


def _may_change(word: str) -> bool:
    return key(word) in (*PLACES, *TRUSTED) or word.lstrip("+~").startswith(OF_THE_SWEEP)


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
