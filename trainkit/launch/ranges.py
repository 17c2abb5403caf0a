"""The values of the nodes `sample` and `export` of conf/config.yaml, which no constructor looks at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainkit.launch.composition import Composition
from trainkit.launch.explain import UserError, did_you_mean, shown

FORMATS = ("trainkit", "hf")


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
