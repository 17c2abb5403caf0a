"""The values of conf/config.yaml that no constructor looks at: compile, and the nodes sample, export and plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainkit.launch.check.composition import Composition
from trainkit.launch.explain import UserError, did_you_mean, shown
from trainkit.launch.explain import listed as known
from trainkit.plan.devices import MEMORY_GB, listed

FORMATS = ("trainkit", "hf")
COMPILE = (True, False, "auto")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or isinstance(value, float)


# What each value must be: a test that takes anything, and its words.
SAMPLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prompt": (lambda v: isinstance(v, str) and not any("\ud800" <= c <= "\udfff" for c in v), "a text in UTF-8"),
    "tokens": (lambda v: _whole(v) and v >= 1, "a whole number of at least 1"),
    "temperature": (lambda v: _number(v) and 0 <= v < float("inf"), "a number of at least 0 (0: the likeliest token)"),
    "top_k": (lambda v: v is None or (_whole(v) and v >= 1), "a whole number of at least 1, or null for all tokens"),
    "top_p": (lambda v: _number(v) and 0 < v <= 1, "a number above 0 and at most 1 (1: all tokens)"),
    "count": (lambda v: _whole(v) and v >= 1, "a whole number of at least 1"),
    "seed": (lambda v: _whole(v) and 0 <= v < 2**32, "a whole number from 0 to 4294967295"),
}


def check_sample(job: Composition) -> None:
    """Every setting of mode=sample is one that text can be drawn with."""
    node = _node(job, "sample")
    for name, (fits, words) in SAMPLE.items():
        if not fits(node.get(name)):
            where = job.where(f"sample.{name}")
            raise UserError(f"sample.{name}={shown(node.get(name))}{where}: it must be {words}")


def check_export(job: Composition) -> None:
    """mode=export has a format, and a folder that holds nothing yet."""
    node = _node(job, "export")
    form, folder = node.get("format"), node.get("dir")
    if form not in FORMATS:
        meant = did_you_mean(str(form), FORMATS)
        raise UserError(f"export.format={shown(form)}: no such format{meant}", f"formats: {', '.join(FORMATS)}")
    if folder is not None and (not isinstance(folder, str) or not folder):
        raise UserError(f"export.dir={shown(folder)}: it must name a folder, or be null for one in the run's")
    if job.resolved.get("mode") == "export" and folder is not None:
        check_empty(Path(folder).expanduser())


PLAN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "device": (lambda v: v is None or isinstance(v, str), "a text, or null for the device at hand"),
    "memory_gib": (lambda v: v is None or (_number(v) and 0 < v < float("inf")), "a number above 0, or null"),
    "mfu": (lambda v: _number(v) and 0 < v <= 1, "a number above 0 and at most 1"),
}


def check_plan(job: Composition) -> None:
    """mode=plan plans for a device that is listed, or of which the memory is told; it takes no earlier run."""
    node = _node(job, "plan")
    for name, (fits, words) in PLAN.items():
        if not fits(node.get(name)):
            raise UserError(f"plan.{name}={shown(node.get(name))}{job.where(f'plan.{name}')}: it must be {words}")
    device = node.get("device")
    if device is not None and node.get("memory_gib") is None and listed(device, MEMORY_GB) is None:
        meant = did_you_mean(device, MEMORY_GB)
        raise UserError(
            f"plan.device={device} is not listed{meant}; give plan.memory_gib too", known("listed", MEMORY_GB)
        )
    if job.resolved.get("mode") == "plan" and job.resolved.get("resume"):
        raise UserError("mode=plan plans a run that is to be started: leave out resume=")


def check_compile(job: Composition) -> None:
    if job.resolved.get("compile") not in COMPILE:
        raise UserError(f"compile={shown(job.resolved.get('compile'))}{job.where('compile')}: true, false or auto")


def check_empty(folder: Path) -> None:
    """Raises UserError unless the folder does not exist yet, or is empty."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"export.dir: {str(folder)!r} is a file; name a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"{str(folder)!r} is not empty, and an export overwrites nothing; name another folder: export.dir=FOLDER"
        )


def _node(job: Composition, name: str) -> dict[str, Any]:
    node = job.resolved.get(name)
    if not isinstance(node, dict):
        raise UserError(f"{name}={shown(node)}: {name} is a node with keys of its own; set those")
    return node
