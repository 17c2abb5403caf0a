"""A composed configuration together with where each of its keys came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from trainkit.launch.explain import UserError, explained, listed
from trainkit.launch.sources import Folders, Source, place, sources, with_includes

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@dataclass
class Composition:
    """One job's configuration as plain data, raw (with `${...}`) and resolved.

    words: what the command line set or chose. earlier: it was loaded from a run's directory, so no YAML file of this
    project is to be blamed for a key.
    """

    cfg: DictConfig
    folders: Folders = field(default_factory=Folders)
    words: list[Override] = field(default_factory=list)
    earlier: bool = False

    @cached_property
    def files(self) -> list[Source]:
        return [] if self.earlier else sources(self.choices, self.folders)

    @cached_property
    def _values(self) -> list[Override]:
        """The words that set keys; a dict given to a group sets keys too."""
        return [
            word for word in self.words if not isinstance(word.value(), str) or word.key_or_group not in self.choices
        ]

    @cached_property
    def choices(self) -> dict[str, Any]:
        return dict(self.raw.get("choices") or {})

    @property
    def raw(self) -> dict[str, Any]:
        """Read anew each time, since words may have been set since."""
        return _plain(self.cfg, resolve=False)

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """Read once all words are set. Raises UserError where an interpolation leads nowhere, saying who could help."""
        from omegaconf.errors import OmegaConfBaseException

        try:
            return _plain(self.cfg, resolve=True)
        except OmegaConfBaseException as error:
            raise UserError(*self._unreadable(error)) from error
        except RecursionError as error:
            raise UserError("keys read each other through ${...} in a circle, so none has a value") from error

    def where(self, key: str) -> str:
        """Where `key` was set, as " (conf/norm/mix.yaml:3)", " (command line)" or, for an earlier run, nothing."""
        if any(key == word.key_or_group or key.startswith(f"{word.key_or_group}.") for word in self._values):
            return " (command line)"
        found = place(key, self.files)
        return f" ({found})" if found else ""

    def _unreadable(self, error: Exception) -> list[str]:
        reader = str(getattr(error, "full_key", None) or "a key")
        if "Recursive" in str(error):
            return [f"{reader} cannot be resolved{self.where(reader)}: keys read each other in a circle"]
        found = re.search(r"Interpolation key '([^']*)' not found", str(error))
        if not found:
            return [f"{reader} cannot be resolved{self.where(reader)}: {str(error).splitlines()[0]}"]
        wanted = found[1]
        group, _, key = wanted.partition(".")
        head = f"{reader} reads ${{{wanted}}}{self.where(reader)}"
        if group not in self.choices:
            return [f"{head}, but there is no key {wanted!r}"]
        helpful = options_with(wanted, group, self.folders)
        return [
            f"{head}, but {group}={self.choices[group]} has no {key!r}",
            listed(f"options of {group} that have it", helpful),
            f"try {group}={helpful[0]}, or set {reader} yourself" if helpful else f"set {reader} yourself",
        ]


def _plain(cfg: DictConfig, *, resolve: bool) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return _with_text_keys(OmegaConf.to_container(cfg, resolve=resolve))


def _with_text_keys(node: Any) -> Any:
    """`node` with every key a str, as dotted keys spell them; YAML also allows numbers and dates."""
    if isinstance(node, dict):
        return {str(key): _with_text_keys(value) for key, value in node.items()}
    return [_with_text_keys(value) for value in node] if isinstance(node, list) else node


def options_with(key: str, group: str, folders: Folders) -> list[str]:
    """The options of `group` whose files set `key`."""
    found = []
    for option in folders.options(group):
        with explained(f"{group}={option}"):
            if any(source.has(key) for source in with_includes(group, option, folders)):
                found.append(option)
    return found


def walk(node: Any, twin: Any = None, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every (dotted key, value, twin's value) below `node`, parents first; list items as `key.0`.

    twin: the same tree resolved, to be walked in step (where `node` holds `${...}` the walk goes no deeper).
    """
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        inner, other = f"{key}.{name}" if key else str(name), None if twin is None else twin[name]
        yield inner, value, other
        yield from walk(value, other, inner)


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every (dotted key, value) below `node` whose value is no dict; `node` itself where it is none."""
    if not isinstance(node, dict):
        yield key, node
        return
    for name, value in node.items():
        yield from leaves(value, f"{key}.{name}" if key else str(name))


def exists(node: Any, key: str) -> bool:
    """Whether plain data has a dotted key, be its value null."""
    parent, _, name = key.rpartition(".")
    above = select(node, parent)
    if isinstance(above, list):
        return name.isdigit() and int(name) < len(above)
    return isinstance(above, dict) and name in above


def select(node: Any, key: str) -> Any:
    """The value at a dotted key of plain data, or None."""
    for name in key.split(".") if key else ():
        if isinstance(node, list) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        else:
            node = node.get(name) if isinstance(node, dict) else None
    return node
