"""`hparams_search=`: what a sweep adds to its words or looks for, read and checked before anything is started.

A node of this group says its kind. lr_sensitivity adds learning rates to the grid of a sweep (-m); optuna has a space,
and mode=search asks it for one job after the other (trainkit/launch/mode/suggestions.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeGuard

from trainkit.launch.check import words
from trainkit.launch.check.choices import check_choice
from trainkit.launch.check.composition import Composition
from trainkit.launch.check.values import SPACE, check_value
from trainkit.launch.compose import is_value
from trainkit.launch.explain import UserError, did_you_mean, shown
from trainkit.launch.sources import Folders, default_groups
from trainkit.launch.summary import STAGES

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

GROUP = "hparams_search"
KINDS = ("lr_sensitivity", "optuna")
ONE_OF = {"direction": ("minimize", "maximize"), "sampler": ("tpe", "random")}
RANGE = ("low", "high", "log", "step")
MAY_CHANGE = ("trials",)  # settings that a search may be continued with other values of
# What no space may vary: it belongs to the whole search, or opens what only a typed word may.
WHOLE = ("mode", "resume", "sweep", "hydra", "paths", "plugins", GROUP)
PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # a text that needs no quotes in a word
NO_TEXT = ("null", "true", "false", "nan", "inf")  # and that YAML does not read as something else

Search = dict[str, Any]  # the node of the group as plain data


def chosen(cfg: DictConfig, multirun: bool) -> Search | None:
    """What the configuration of a sweep's job, or of a search, looks for; None for hparams_search=none.

    Raises UserError where -m, the mode and the kind do not go together.
    """
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(cfg[GROUP], resolve=True) if cfg.get(GROUP) else None
    kind, option = (node["kind"] if isinstance(node, dict) else None), cfg.choices.get(GROUP)
    searching = cfg.mode == "search"
    if searching and multirun:
        raise UserError("mode=search chooses its jobs itself: leave out -m, or mode=search for a grid of your own")
    if searching and kind == "lr_sensitivity":
        raise UserError(f"{GROUP}={option} is a sweep: python run.py -m {GROUP}={option} …, without mode=search")
    if searching and node is None and cfg.sweep.resume is None:
        raise UserError(f"mode=search needs something that chooses the jobs: add {GROUP}=optuna")
    if kind == "lr_sensitivity" and not multirun:
        raise UserError(
            f"{GROUP}={option} is a sweep over learning rates: add -m (python run.py -m {GROUP}={option} …)"
        )
    if kind == "optuna" and not searching:
        raise UserError(f"{GROUP}={option} is for a search: python run.py mode=search {GROUP}={option} …, without -m")
    if searching:
        check_installed()
    return node  # type: ignore[return-value]


def check_installed() -> None:
    if find_spec("optuna") is None:
        raise UserError("a search needs Optuna, which is not installed: pip install 'trainkit[search]'")


def of_a_job(typed: Sequence[str], cfg: DictConfig) -> list[str]:
    """The words of a job from those of its sweep or search, of which it must know nothing."""
    kept = [word for word in typed if _key(word).split(".")[0] != GROUP and word != "mode=search"]
    if cfg.choices.get(GROUP, "none") != "none" and not any(_key(word) == GROUP for word in typed):
        kept.append(f"{GROUP}=none")  # an experiment has chosen it
    if cfg.mode == "search" and "mode=search" not in typed:
        kept.append("mode=train")
    return kept


def rates(search: Search | None, typed: Sequence[Override]) -> list[str]:
    """The word that lr_sensitivity adds to a sweep; none where the user sweeps over learning rates himself."""
    if search is None or search["kind"] != "lr_sensitivity":
        return []
    key = search["key"]
    mine = next((word for word in reversed(typed) if word.key_or_group == key), None)
    if mine is not None and (mine.is_add() or mine.is_force_add()):
        raise UserError(f"{mine.input_line}: {key} is there already; write {(mine.input_line or '').lstrip('+')}")
    if mine is None:
        return [f"{key}={','.join(text(rate) for rate in search['lr'])}"]
    if not mine.is_sweep_override():
        raise UserError(
            f"{mine.input_line} fixes what {GROUP} is to vary",
            f"leave it out, or give several: {mine.input_line},…; its own values are {GROUP}.lr=[…]",
        )
    return []


# --- the node ------------------------------------------------------------------------------------------------------


def check_search(job: Composition) -> None:
    """The settings are ones that can be searched with."""
    if job.resolved.get(GROUP):
        check_node(job.resolved[GROUP])


def check_node(node: Search) -> None:
    """The same of a node, which may also have been read from sweep.json."""
    if node.get("kind") not in KINDS:
        raise UserError(f"{GROUP}.kind is {' or '.join(KINDS)}; got {shown(node.get('kind'))}")
    (_check_rates if node["kind"] == "lr_sensitivity" else _check_optuna)(node)


def _check_rates(node: Search) -> None:
    values = node.get("lr")
    numbers = values if isinstance(values, list) else []
    if len(set(map(str, numbers))) < 2 or not all(_number(v) and 0 < v < math.inf for v in numbers):
        raise UserError(f"{GROUP}.lr must list at least two different positive numbers; got {shown(values)}")
    if not isinstance(node.get("key"), str) or not node["key"]:
        raise UserError(f"{GROUP}.key names the setting that is varied, as optimizer.lr; got {shown(node.get('key'))}")


def _check_optuna(node: Search) -> None:
    for name, legal in ONE_OF.items():
        if node.get(name) not in legal:
            meant = did_you_mean(str(node.get(name)), legal)
            raise UserError(f"{GROUP}.{name} is {' or '.join(legal)}; got {shown(node.get(name))}{meant}")
    trials, seed, metric = node.get("trials"), node.get("seed"), node.get("metric")
    if not _whole(trials) or trials < 1:
        raise UserError(f"{GROUP}.trials counts jobs, at least 1; got {shown(trials)}")
    if not _whole(seed) or not 0 <= seed < 2**31:
        raise UserError(f"{GROUP}.seed is a whole number from 0 to {2**31 - 1}; got {shown(seed)}")
    if not isinstance(metric, str) or not metric.startswith(STAGES):
        raise UserError(
            f"{GROUP}.metric={shown(metric)}: no job ends with such a number",
            f"it is one of the final metrics in a run's result.json, {', '.join(f'{stage}…' for stage in STAGES)}",
        )
    check_space(node.get("space"))


# --- the space -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """One of several values, as a word writes them."""

    values: tuple[str, ...]

    def ends(self) -> tuple[str, ...]:
        return self.values

    def text(self, value: str) -> str:
        return value


@dataclass(frozen=True)
class Range:
    """The numbers from low to high, both included; whole ones where both are. log: evenly spaced in the logarithm."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def whole(self) -> bool:
        return all(isinstance(value, int) for value in (self.low, self.high, self.step or 0))

    def ends(self) -> tuple[str, ...]:
        return (text(self.low), text(self.high))

    def text(self, value: float) -> str:
        """A value as a word has it: to a ten-thousandth of itself (log) or of the range at least; the rest is noise."""
        if self.whole:
            return text(int(value))
        if self.log:
            short = float(f"{value:.4g}")
        else:
            short = round(value, 4 - math.floor(math.log10(self.step or self.high - self.low)))
        return text(min(max(short, float(self.low)), float(self.high)))


def space(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (key, its values or range) of a space, which may be written with dots or as nodes within nodes."""
    if not isinstance(node, dict) or set(node) & set(RANGE):
        yield key, node
        return
    for name, inner in node.items():
        yield from space(inner, f"{key}.{name}" if key else str(name))


def entries(search: Search) -> dict[str, Choice | Range]:
    """The space of a search that has been checked."""
    found: dict[str, Choice | Range] = {}
    for key, values in space(search["space"]):
        found[key] = Choice(tuple(map(text, values))) if isinstance(values, list) else Range(**values)
    return found


def check_space(node: Any) -> None:
    """Every key of the space has values to choose from. Raises UserError."""
    if not isinstance(node, dict) or not node:
        raise UserError(
            f"{SPACE} is empty, so there is nothing to search",
            f"give it keys with values: '{SPACE}={{optimizer.lr:{{low:1e-4,high:1e-1,log:true}},norm:[pre,peri]}}'",
        )
    for key, values in space(node):
        where = f"{SPACE}: {key}"
        if not re.fullmatch(r"[\w./-]+", key):
            raise UserError(f"{where} is no key of the configuration")
        if re.split(r"[./]", key)[0] in WHOLE:
            raise UserError(f"{where} belongs to the whole search and has one value; write it as a word of its own")
        if isinstance(values, dict):
            _check_range(where, values)
        elif not isinstance(values, list):
            raise UserError(f"{where} is to be a list of values or {{low: …, high: …}}; got {shown(values)}")
        elif not values or len(set(map(text, values))) < len(values):
            raise UserError(f"{where} is to list values, each once; got {shown(values)}")


def _check_range(where: str, node: dict[str, Any]) -> None:
    other = [name for name in node if name not in RANGE]
    if other or not {"low", "high"} <= set(node):
        raise UserError(f"{where} is {{low: …, high: …}} with log: true or step: … if wanted; got {shown(node)}")
    low, high, step, log = node["low"], node["high"], node.get("step"), node.get("log", False)
    if not isinstance(log, bool):
        raise UserError(f"{where}.log is true or false; got {shown(log)}")
    for name in ("low", "high", *(["step"] if step is not None else [])):
        if not _number(node[name]) or not math.isfinite(node[name]):
            raise UserError(f"{where}.{name} is a number; got {shown(node[name])}")
    if low >= high:
        raise UserError(f"{where} must have low < high; got low={shown(low)}, high={shown(high)}")
    if log and low <= 0:
        raise UserError(f"{where} has log: true, so low must be positive; got low={shown(low)}")
    if step is not None and (log or step <= 0):
        raise UserError(f"{where} has a step, which is positive and goes without log: true; got step={shown(step)}")


def check_words(
    search: Search, base: Sequence[str], folders: Folders, choose: Callable[[list[str]], DictConfig]
) -> None:
    """Every key of the space exists, takes such values, and is not fixed by a word of the command line beside it.

    Whether values go together is seen by the job that has them. Keys are looked for in the configuration that the
    first options of the space make.
    """
    found = entries(search)
    fixed = next((word for word in base if _key(word) in found), None)
    if fixed:
        raise UserError(f"{fixed} fixes what {SPACE} varies; leave it out there or here")
    every = [words.parse([f"{key}={value}" for value in values.ends()], folders) for key, values in found.items()]
    choices = [column for column in every if not is_value(column[0], folders)]
    standing = default_groups()
    for word in (word for column in choices for word in column):
        check_choice(word, folders, standing)
    given = words.parse([w for w in base if not w.startswith("hydra.")], folders)
    firsts = [*(word for word in given if not is_value(word, folders)), *(column[0] for column in choices)]
    places = [word for word in base if word.startswith("hydra.searchpath")]
    job = Composition(choose([*places, *(word.input_line or "" for word in firsts)]), folders, firsts)
    for column in every:
        for word in column if column not in choices else ():
            check_value(word, job)


def text(value: Any) -> str:
    """A plain value as the value of a word."""
    if value is None or isinstance(value, bool):
        return shown(value)
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and value.lower() not in NO_TEXT else words.quoted(value)
    return repr(value)


def changed(before: Mapping[str, Any], now: Mapping[str, Any], typed: Sequence[str]) -> str | None:
    """The first typed word about the search that says something else than it was started with, or None."""
    for word in typed:
        group, _, name = _key(word).partition(".")
        name = name.split(".")[0] or "kind"
        if group == GROUP and name not in MAY_CHANGE and before.get(name) != now.get(name):
            return word
    return None


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
