"""What a key that does not exist was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainkit.launch.check.composition import Composition, options_with, select, walk
from trainkit.launch.explain import listed, nearest

OURS = ("choices", "requires", "prefers")  # written by the choices, not by people


def unknown(typed: str, key: str, job: Composition, raw: dict[str, Any]) -> list[str]:
    """The lines about `key`, which `typed` wants to change and which is not there."""
    through = _through(raw, key)
    if through:
        node, reads = through
        return [f"{typed}: {node} reads ${{{reads}}}; set {reads}{key.removeprefix(node)} instead"]
    parent, _, name = key.rpartition(".")
    node = select(raw, parent)
    deeper = [inner for inner, *_ in walk(node) if inner.rpartition(".")[2] == name] if parent else []
    if deeper:
        return [f"{typed}: {parent} has no key '{name}'; did you mean '{parent}.{deeper[0]}'?"]
    if parent and isinstance(node, dict) and (hint := _other_option(key, job)):
        return [f"{typed}: {parent} has no key '{name}'", hint]
    sibling = nearest(name, _siblings(parent, raw, job))
    near = (f"{parent}.{sibling}" if parent else sibling) if sibling else similar(key, raw)
    keys = [k for k in node if not k.startswith("_")] if isinstance(node, dict) and parent else []
    return [
        f"{typed}: there is no key '{key}'" + (f"; did you mean '{near}'?" if near else ""),
        listed(f"keys of {parent}", keys),
        "" if near else "python run.py --help lists the groups and the keys at the top",
    ]


def similar(key: str, raw: dict[str, Any]) -> str:
    """An existing key of the same last name, or spelled alike; "" where there is none."""
    keys = [k for k, *_ in walk(raw) if k.split(".")[0] not in OURS and not k.rpartition(".")[2].startswith("_")]
    by_name = {k.rpartition(".")[2]: k for k in reversed(keys)}
    name = key.rpartition(".")[2]
    top_is_known = key.split(".")[0] in raw
    alike = None if top_is_known else nearest(key, keys)
    return by_name.get(name) or alike or by_name.get(nearest(name, by_name) or "", "")


def _siblings(parent: str, raw: dict[str, Any], job: Composition) -> Iterable[str]:
    node = select(raw, parent)
    names = [name for name in node if name not in OURS] if isinstance(node, dict) else []
    return names if parent else [*names, *job.folders.groups]


def _other_option(key: str, job: Composition) -> str:
    """Which options of the group have the key that the chosen one lacks; optimizer/base goes before optimizer."""
    parts = key.split(".")
    elsewhere = {choice.partition("@")[2] for choice in job.choices}  # of a group whose option has another place
    above = [parts[:i] for i in range(len(parts) - 1, 0, -1)]
    group = next(("/".join(p) for p in above if "/".join(p) in job.choices or ".".join(p) in elsewhere), "")
    having = options_with(key, group, job.folders) if group else []
    return (
        f"{key} exists with {group}={' or '.join(having)}; chosen is {group}={job.choices.get(group)}" if having else ""
    )


def _through(raw: dict[str, Any], key: str) -> tuple[str, str] | None:
    """(node, what it reads) where a key leads through an interpolation such as model.norm = ${norm}."""
    parts = key.split(".")
    for i in range(1, len(parts)):
        node = select(raw, ".".join(parts[:i]))
        if isinstance(node, str) and node.startswith("${") and node.endswith("}"):
            return ".".join(parts[:i]), node[2:-1]
    return None
