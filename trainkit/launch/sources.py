"""The YAML files that a configuration is made of: which there are, which were read, and where a key stands."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trainkit.launch.explain import display

CONF = Path(__file__).resolve().parents[2] / "conf"
RUN = CONF.parent / "run.py"
FILED = ("experiment",)  # whose options lie in folders: experiment=continual/nap


@dataclass(frozen=True)
class Folders:
    """Where YAML files are looked for: conf/, then the user's own folders (hydra.searchpath), the first hit winning."""

    roots: tuple[Path, ...] = (CONF,)

    @cached_property
    def groups(self) -> list[str]:
        """Every folder with options in it, as `norm` or `outer/inner`; what is filed in folders is one group."""
        files = (file.relative_to(root).parent for root in self.roots for file in sorted(root.rglob("*.yaml")))
        folders = (folder.parts[: 1 if folder.parts[:1] and folder.parts[0] in FILED else None] for folder in files)
        return list(dict.fromkeys("/".join(parts) for parts in folders if parts))

    def options(self, group: str) -> list[str]:
        """The files that may be chosen from `group`."""
        pattern = "**/*.yaml" if group in FILED else "*.yaml"
        found = ((root / group, file) for root in self.roots for file in (root / group).glob(pattern))
        return sorted({file.relative_to(folder).with_suffix("").as_posix() for folder, file in found})

    def file(self, group: str, option: str) -> Path | None:
        files = (root / group / f"{option}.yaml" for root in self.roots)
        return next((file for file in files if file.is_file()), None)

    def get_group_options(self, group_name: str, *_: Any, **__: Any) -> list[str]:
        """`options` under the name that Hydra's parser asks for when it expands glob()."""
        return self.options(group_name)


def folder_of(entry: str) -> Path:
    """The folder that an entry of hydra.searchpath names: a path, file://path or pkg://package.folder."""
    scheme, _, rest = entry.rpartition("://")
    if scheme != "pkg":
        return Path(rest).expanduser()
    top, *inner = re.split(r"[./]", rest)
    spec = find_spec(top) if top.isidentifier() else None
    base = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    return Path(base, *inner) if base else Path(rest)


@dataclass(frozen=True)
class Source:
    """One YAML file that was read: by whose choice (`model=vit`), and the node its keys land in (package).

    at: the package that a file which includes it gives it (`/optimizer/sgd@_here_`), instead of its own.
    """

    choice: str
    path: Path
    group: str = ""
    at: str | None = None

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def data(self) -> Mapping[str, Any]:
        import yaml

        loaded = yaml.load(self.text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return loaded if isinstance(loaded, dict) else {}

    @property
    def package(self) -> str:
        if self.at is not None:
            return self.at
        header = re.search(r"^#\s*@package\s+(\S+)", self.text, re.MULTILINE)
        name = header[1] if header else "_group_"
        return "" if name == "_global_" else name.replace("_group_", self.group.replace("/", "."))

    def find(self, key: str) -> Any:
        """The value at a key of the whole configuration, or None where this file does not set it."""
        node: Any = self.data if _below(key, self.package) else None
        for name in self._path(key):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def has(self, key: str) -> bool:
        parent, _, name = key.rpartition(".")
        node = self.find(parent)
        return isinstance(node, dict) and name in node

    def line(self, key: str) -> int | None:
        """The line that sets `key`, or None; a file's whole node stands on line 1."""
        import yaml

        if not _below(key, self.package):
            return None
        node, line = yaml.compose(self.text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), 1
        for name in self._path(key):
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            node, line = next(((v, k.start_mark.line + 1) for k, v in pairs if k.value == name), (None, None))
        return line

    def comment(self, key: str) -> str:
        """The comment behind `key` on its line."""
        line = self.line(key)
        found = re.search(r"\s#\s*(.*)$", self.text.splitlines()[line - 1]) if line else None
        return found[1] if found else ""

    def _path(self, key: str) -> list[str]:
        inner = key.removeprefix(self.package).removeprefix(".")
        return inner.split(".") if inner else []

    def here(self, group: str, option: str) -> bool:
        """Whether it includes that file with @_here_, so that its keys land where this file's do."""
        names = (f"{option}@_here_", f"/{group}/{option}@_here_")
        return any(entry in names for entry in self.data.get("defaults") or () if isinstance(entry, str))

    def package_of(self, group: str, option: str) -> str | None:
        """Where the keys of a file that it includes land: here, or below for a group within its own; None: in the
        file's own package."""
        if self.here(group, option):
            return self.package
        inner = group.removeprefix(f"{self.group}/")
        return ".".join((self.package, *inner.split("/"))) if self.group and inner != group else None

    def defaults(self) -> Iterator[tuple[str, Any, bool]]:
        """The entries of its defaults list: (group, option, whether it overrides another file's choice)."""
        for entry in self.data.get("defaults") or ():
            if isinstance(entry, str):
                group, _, option = _absolute(entry.split("@")[0], self.group).rpartition("/")
                yield group, option, False
            elif isinstance(entry, dict):
                for words, option in entry.items():
                    *marks, group = str(words).split("@")[0].split()
                    yield _absolute(group, self.group), option, "override" in marks


def _below(key: str, package: str) -> bool:
    return not package or key == package or key.startswith(package + ".")


def _absolute(name: str, group: str) -> str:
    return name[1:] if name.startswith("/") else f"{group}/{name}" if group else name


def sources(choices: Mapping[str, Any], folders: Folders) -> list[Source]:
    """The files behind `choices`, with the files that they include; what stands in a later one wins."""
    found = [Source("conf/config.yaml", CONF / "config.yaml")]
    order = list(default_groups())
    for choice, options in sorted(choices.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1):
        group, _, at = choice.partition("@")  # optimizer/rest@optimizer.base.rest
        for option in options if isinstance(options, list) else [options]:
            found.extend(_with_includes(f"{choice}={option}", group, option, folders, choices, at or None))
    return found


def with_includes(group: str, option: Any, folders: Folders, choices: Container[str] = ()) -> Iterator[Source]:
    """The file of an option after those that it includes, but for groups within it that `choices` has."""
    yield from _with_includes(f"{group}={option}", group, option, folders, choices)


def _with_includes(
    choice: str,
    group: str,
    option: Any,
    folders: Folders,
    choices: Container[str],
    at: str | None = None,
    depth: int = 0,
) -> Iterator[Source]:
    path = folders.file(group, str(option))
    if path is None or depth > 10:
        return
    source = Source(choice, path, group, at)
    for inner, name, is_override in source.defaults():
        for one in name if isinstance(name, list) else [name]:
            where = source.package_of(inner, one)
            chosen = {inner, f"{inner}@{where}"} if where == inner.replace("/", ".") else {f"{inner}@{where}"}
            is_chosen = inner.startswith(f"{group}/") and any(choice in choices for choice in chosen)
            if not is_override and one != "_self_" and not is_chosen:
                yield from _with_includes(choice, inner, one, folders, choices, where, depth + 1)
    yield source


def owners(inner: str, folders: Folders) -> list[str]:
    """The options of `optimizer` that choose from `optimizer/base`, and so for any other group within a group."""
    group = inner.rpartition("/")[0]
    files = {option: folders.file(group, option) for option in folders.options(group)}
    sources = {option: Source(f"{group}={option}", path, group) for option, path in files.items() if path}
    return [option for option, source in sources.items() if inner in {name for name, *_ in source.defaults()}]


def default_groups() -> dict[str, Any]:
    """The groups that every run chooses from, in the order of conf/config.yaml, with their default options."""
    return {group: option for group, option, _ in Source("conf/config.yaml", CONF / "config.yaml").defaults() if group}


def place(key: str, files: Iterable[Source]) -> str:
    """ "conf/norm/mix.yaml:3", the last file that sets `key`; "" where none does."""
    for source in reversed(list(files)):
        if line := source.line(key):
            return f"{display(source.path)}:{line}"
    return ""
