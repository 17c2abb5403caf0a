"""Checks of keys and values: they exist, `+` and `~` mean what they say, types are kept, nothing is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainkit.launch.check.annotation import fits
from trainkit.launch.check.composition import Composition, exists, leaves, select, walk
from trainkit.launch.check.suggest import OURS, similar, unknown
from trainkit.launch.check.targets import parameter, wrong_type
from trainkit.launch.explain import UserError, did_you_mean, shown
from trainkit.launch.sources import CONF, Source

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "a node"}
ACCUMULATE = "accumulate_grad_batches"
SPACE = "hparams_search.space"  # keys of the configuration with their ranges, so none that is there before
TEXTS = ("name", "resume", "init_from", "to")  # keys of conf/config.yaml that are null by default
MIXED = ("compile",)  # keys of conf/config.yaml whose values are of several types, which ranges.py looks at


def check_value(word: Override, job: Composition) -> None:
    """Compares one word with the configuration that it is about to change."""
    key, typed, raw = word.key_or_group, word.input_line or "", job.raw
    if key.split(".")[0] in OURS:
        raise UserError(f"{typed}: {key} is written by the chosen options and cannot be set")
    if word.is_delete():
        _check_delete(typed, key, job, raw)
    elif f"{key}.".startswith(f"{SPACE}.") and exists(raw, SPACE):
        return  # hparams_search.check_space looks at it
    elif word.is_add():
        _check_add(typed, key, raw, job)
    elif not word.is_force_add():
        for inner, value in leaves(word.value(), key):
            if not exists(raw, inner):
                raise UserError(*unknown(typed, inner, job, raw))
            _check_type(typed, inner, value, raw)


def _check_delete(typed: str, key: str, job: Composition, raw: dict[str, Any]) -> None:
    if not exists(raw, key):
        raise UserError(*unknown(typed, key, job, raw))
    if "." not in key:
        raise UserError(f"{typed}: {key} is always needed; write {key}=null for none")


def _check_add(typed: str, key: str, raw: dict[str, Any], job: Composition) -> None:
    if exists(raw, key):
        raise UserError(f"{typed}: {key} exists{job.where(key)}; drop the '+' to set it")
    meant = similar(key, raw)
    if "." not in key and meant.endswith(f".{key}"):
        raise UserError(f"{typed} adds a key that nothing reads; did you mean '{meant}'?")


def _check_type(typed: str, key: str, value: Any, raw: dict[str, Any]) -> None:
    default = select(raw, key)
    if value is None or default is None or default == "???" or (isinstance(value, str) and "${" in value):
        return
    if isinstance(default, str) and default.startswith("${"):
        _check_built(typed, key, value, default[2:-1], raw)
        return
    group = key.replace(".", "/")
    if group in raw["choices"] and _scalar(value):
        raise UserError(f"{typed}: {key} is a node with keys of its own", f"choose it by its own word: {group}={value}")
    if key in MIXED:
        return
    annotated = parameter(raw, key)
    verdict = fits(annotated, value) if annotated else None
    if annotated and verdict is False:
        raise UserError(wrong_type(key, " (command line)", annotated, value))
    if verdict is None and not _alike(default, value, strict=not _beside_target(key, raw)):
        raise UserError(
            f"{typed}: {key} wants {KINDS[type(default)]} such as {shown(default)}, not {KINDS[type(value)]}",
            f"quoted it is a text: {key}=\\'{shown(value)}\\'" if isinstance(default, str) and _scalar(value) else "",
        )


def _check_built(typed: str, key: str, value: Any, reads: str, raw: dict[str, Any]) -> None:
    """Where the default is a whole node (model.norm = ${norm}), no plain value can stand for it."""
    if isinstance(select(raw, reads), dict):
        raise UserError(
            f"{typed}: {key} is built from the node '{reads}' and takes no plain value",
            f"choose it by its own word: {reads}={shown(value)}" if _scalar(value) else "",
        )


def _scalar(value: Any) -> bool:
    return not isinstance(value, (list, dict))


def _beside_target(key: str, raw: dict[str, Any]) -> bool:
    node = select(raw, key.rpartition(".")[0])
    return isinstance(node, dict) and "_target_" in node


def _alike(default: Any, value: Any, *, strict: bool) -> bool:
    """Whether `value` is of the default's type; strict: a whole number stays whole (no signature says otherwise)."""
    if isinstance(default, bool) or isinstance(value, bool):
        return type(default) is type(value)
    if isinstance(default, (int, float)):
        return isinstance(value, int if strict and isinstance(default, int) else (int, float))
    return type(default) is type(value)


def check_missing(job: Composition) -> None:
    """No `???` is left: the YAML says that only the user can know this value."""
    for key, value, _ in walk(job.raw):
        if value == "???":
            group = key.split(".")[0]
            chosen = f", because {group}={job.choices[group]} was chosen" if group in job.choices else ""
            comment = next((c for c in (source.comment(key) for source in job.files) if c), "")
            raise UserError(f"{key} must be given{chosen}: add {key}=VALUE{job.where(key)}", comment)


def check_nodes(job: Composition) -> None:
    """Each group is a node with keys, which a YAML file of the user's own may have replaced by a plain value."""
    for key, value in job.raw.items():
        if key in job.choices and not isinstance(value, (dict, type(None))):
            raise UserError(f"{key}={shown(value)}{job.where(key)}: {key} is a node with keys of its own")


def check_top(job: Composition) -> None:
    """The top level, which no signature describes: a key of conf/config.yaml keeps its type, and a new one is read."""
    shipped = Source("conf/config.yaml", CONF / "config.yaml").data
    known = {*shipped, *job.choices, *job.folders.groups, *OURS, *(word.key_or_group for word in job.words)}
    for key, value in job.resolved.items():
        default = "" if key in TEXTS else shipped.get(key)
        if key not in MIXED and default is not None and value is not None and not _alike(default, value, strict=True):
            wanted, got = KINDS[type(default)], KINDS[type(value)]
            raise UserError(f"{key}={shown(value)}{job.where(key)}: {key} wants {wanted}, not {got}")
        if key not in known and f"${{{key}" not in str(job.raw):
            raise UserError(f"nothing reads the key '{key}'{job.where(key)}{did_you_mean(key, known)}")


def check_share(job: Composition) -> None:
    """data.batch_size is of the whole step: processes and accumulated batches get equal parts of it."""
    data, trainer = job.resolved.get("data") or {}, job.resolved.get("trainer") or {}
    if not str(data.get("_target_")).startswith("trainkit.data."):
        return
    size, devices, nodes, batches = (
        number if isinstance(number, int) and number > 0 else 0  # 0: "auto", a list of devices; the run will tell
        for number in (data.get("batch_size"), *(trainer.get(name, 1) for name in ("devices", "num_nodes", ACCUMULATE)))
    )
    shares = devices * nodes * batches
    if size and shares and size % shares:
        raise UserError(
            f"data.batch_size={size} must be a multiple of {devices * nodes} processes x "
            f"trainer.{ACCUMULATE}={batches}; try {-(-size // shares) * shares}"
        )
