"""Checks of what is chosen: groups, options, and companions that choices bring along or require."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from trainkit.launch.check.composition import Composition, select
from trainkit.launch.explain import UserError, did_you_mean, listed, shown
from trainkit.launch.sources import Folders, Source, owners

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

MANY = ("callbacks", "logger")  # groups of named listeners, of which several may be chosen
ON_ERROR = ("continue", "stop")
# The launchers that go with a sweep, and the extra of pyproject.toml that brings each.
LAUNCHERS = {"submitit_slurm": "slurm", "submitit_local": "slurm", "ray": "ray", "joblib": "joblib"}
OVERLAYS = ("experiment", "debug")  # they pin a whole run: what they choose beats a companion, not the command line


def check_sweep(word: Override, multirun: bool, searching: bool = False) -> None:
    """A sweep needs -m, and sweeps only what belongs to a job. searching: mode=search has settings of a sweep, too."""
    key, typed = word.key_or_group, word.input_line
    of_the_sweep = key.split(".")[0] in ("sweep", "hparams_search")
    if key.startswith("sweep") and of_the_sweep and not (multirun or searching):
        raise UserError(f"{typed} is about a sweep: add -m (python run.py -m {typed} …), or leave it out for one run")
    if not word.is_sweep_override():
        return
    if word.is_hydra_override() or of_the_sweep or key == "paths.run_dir":
        raise UserError(f"{typed}: {key} belongs to the whole sweep and has one value")
    if searching:
        raise UserError(f"{typed}: a search takes its values from a space: hparams_search.space.{key}=[a,b,…]")
    if not multirun:
        value = (typed or "").partition("=")[2]
        raise UserError(
            f"{typed} is a sweep, one job for each value: add -m (python run.py -m {typed})",
            f"if a list is meant, write {key}=[{value}]" if "(" not in value else "",
        )


def check_launcher(word: Override) -> None:
    """A launcher of ours is installed, or the user is told how to."""
    extra = LAUNCHERS.get(str(word.value()))
    if extra is None:
        return
    try:
        found = find_spec(f"hydra_plugins.hydra_{'submitit' if extra == 'slurm' else extra}_launcher")
    except ModuleNotFoundError:  # no launcher at all
        found = None
    if found is None:
        raise UserError(f"{word.input_line} is not installed", f"pip install 'trainkit[{extra}]'")


def check_jobs(cfg: DictConfig, launcher: str = "basic") -> None:
    """What is said about the sweep as a whole can be done; cfg: of its first job."""
    settings = cfg.sweep
    if settings.on_error not in ON_ERROR:
        raise UserError(f"sweep.on_error is {' or '.join(ON_ERROR)}; got {shown(settings.on_error)}")
    if settings.jobs < 1:
        raise UserError(f"sweep.jobs counts the jobs that run at the same time, at least 1; got {settings.jobs}")
    if launcher != "basic" and cfg.mode == "search":
        raise UserError(f"mode=search starts its jobs on this machine; leave out hydra/launcher={launcher}")
    if launcher != "basic" and settings.jobs > 1:
        raise UserError(
            f"sweep.jobs={settings.jobs} is for a sweep without a launcher; hydra/launcher={launcher} decides "
            "by itself how many jobs run at the same time",
            "its settings: python run.py -m hydra/launcher=joblib hydra.launcher.n_jobs=2 …",
        )
    if not isinstance(settings.resume, (str, type(None))):
        raise UserError(f"sweep.resume is the directory of a sweep, or last; got {shown(settings.resume)}")
    if cfg.mode in ("train", "search") and cfg.resume:
        raise UserError(
            f"resume={cfg.resume} goes on with one run, and a sweep starts one run for each job",
            f"to start them all from its weights: init_from={cfg.resume}; to go on with a sweep: sweep.resume=last",
        )


def check_choice(word: Override, folders: Folders, standing: Collection[str]) -> None:
    """The word of a group names an option that exists, one where the group takes one; standing: chosen by default."""
    group, typed, value = word.key_or_group, word.input_line, word.value()
    options = folders.options(group)
    if word.is_delete():
        without = f"write {group}=none" if "none" in options else f"choose another: {group}=OPTION"
        raise UserError(f"{typed}: a run always has a {group}; {without}", listed(f"options of {group}", options))
    if group in standing and (word.is_add() or word.is_force_add()):
        raise UserError(f"{typed}: {group} is chosen by default; drop the '+' to choose another option")
    if isinstance(value, list) and group not in MANY:
        joined = ",".join(str(option) for option in value)
        raise UserError(
            f"{typed}: {group} takes one option, not a list",
            f"for one job with each: python run.py -m {group}={joined}",
        )
    for option in value if isinstance(value, list) else [value]:
        name = shown(option)
        if name not in options:
            elsewhere = [other for other in folders.groups if name in folders.options(other)]
            raise UserError(
                f"{group}={name}: {group} has no option '{name}'{did_you_mean(name, options)}",
                listed(f"options of {group}", options),
                f"'{name}' is an option of {elsewhere[0]}: {elsewhere[0]}={name}" if elsewhere else "",
            )


def check_inner(word: Override, folders: Folders, chosen: Mapping[str, Any]) -> None:
    """A group within a group (optimizer/base) needs an option that chooses from it. chosen: what else is, by group."""
    inner, typed = word.key_or_group, word.input_line
    group, _, name = inner.rpartition("/")
    having = owners(inner, folders) if group else []
    if not having or word.package or str(chosen.get(group)) in having:
        return
    deeper = [other for other in folders.groups if other.startswith(f"{group}/") and other != inner]
    within = [other for other in deeper if str(chosen.get(group)) in owners(other, folders)]
    lacking = [option for option in folders.options(group) if option not in having]
    few = [f"{group}={option}" for option in (having if len(having) <= len(lacking) else lacking)]
    raise UserError(
        f"{typed}: {group}={chosen.get(group)} takes no {inner}",
        *(f"for that of its {other}: {inner}@{other.replace('/', '.')}.{name}={word.value()}" for other in within),
        f"choose one that does: {'' if len(having) <= len(lacking) else 'any but '}{' or '.join(few)}",
    )


def check_rest(job: Composition) -> None:
    """Who is to step the other roles has some to step."""
    for word in job.words:
        inner, _, at = word.key_or_group.partition("@")
        node = (word.package or at or "optimizer.rest").removesuffix(".rest")
        if inner == "optimizer/rest" and select(job.raw, node).get("takes") == "all":
            raise UserError(
                f"{word.input_line}: {node}.takes=all leaves it nothing to step",
                f"say which roles the optimizer takes itself: {node}.takes=[matrix]",
            )


def check_companions(job: Composition) -> None:
    """No two choices want different companions, and no choice lacks one that it cannot work without."""
    pinned = {word.key_or_group for word in job.words if not word.is_hydra_override()}
    for group, wishes in _wishes(job.files).items():
        overlays = {who: what for who, what in wishes.items() if who.partition("=")[0] in OVERLAYS}
        rivals = list((overlays or wishes).items())
        different = [rival for rival in rivals if rival[1] != rivals[0][1]]
        if group not in pinned and different:
            (one, wants), (other, wants_too) = rivals[0], different[0]
            raise UserError(
                f"{one} brings {group}={wants}, but {other} brings {group}={wants_too}",
                f"say which on the command line: {group}={wants} or {group}={wants_too}",
            )
    for who, group, options in _needs(job.files):
        chosen = job.choices.get(group)
        if not {str(c) for c in (chosen if isinstance(chosen, list) else [chosen])} & set(options):
            raise UserError(
                f"{who} cannot work without {group}={' or '.join(options)}; {_blame(job, group, chosen, pinned)}",
                f"choose {group}={options[0]}, or something else than {who}",
            )


def _wishes(files: list[Source]) -> dict[str, dict[str, Any]]:
    """{group: {choice: the option it overrides that group with}}."""
    wishes: dict[str, dict[str, Any]] = {}
    for source in files:
        for group, option, is_override in source.defaults():
            if is_override:
                wishes.setdefault(group, {})[source.choice] = option
    return wishes


def _needs(files: list[Source]) -> Iterator[tuple[str, str, list[str]]]:
    """(choice, group, the options of which it needs one), from each file's `requires`."""
    for source in files:
        needs = source.find("requires")
        for group, options in needs.items() if isinstance(needs, dict) else ():
            yield source.choice, group, [str(o) for o in (options if isinstance(options, list) else [options])]


def _blame(job: Composition, group: str, chosen: Any, pinned: set[str]) -> str:
    if group in pinned:
        return f"the command line says {group}={chosen}"
    bringers = [who for who, what in _wishes(job.files).get(group, {}).items() if what == chosen]
    return f"{bringers[0]} brings {group}={chosen}" if bringers else f"{group}={chosen} is chosen"
