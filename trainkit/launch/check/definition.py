"""What a dotted name is defined as, read from source files without importing them.

A target is located by arithmetic on paths (only its top package is asked for its place), then by the names at the top
level of the module, following re-exports such as `from .x import Y`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

MAX_HOPS = 12  # re-exports followed before a chain counts as circular


@dataclass(frozen=True)
class Definition:
    """A class, function or value, and the module that defines it; name is "" for a module itself.

    Where that module's source cannot be read (compiled or frozen), the node is an empty statement.
    """

    module: str
    name: str
    node: ast.AST


@dataclass(frozen=True)
class Imported:
    """A name that a module only brings in: `from module import name`, or the module itself (name "")."""

    module: str
    name: str


@cache
def source(module: str) -> Path | None:
    """The source file of a module, or None."""
    top, *inner = module.split(".")
    try:
        spec = find_spec(top)
    except (ValueError, ImportError):
        return None
    if spec is None:
        return None
    if not inner:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for base in spec.submodule_search_locations or ():
        path = Path(base, *inner)
        for file in (path / "__init__.py", path.with_suffix(".py")):
            if file.is_file():
                return file
    return None


@cache
def tree(path: Path) -> ast.Module:
    """The parsed file; an unreadable one counts as empty."""
    try:
        return ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ast.Module(body=[], type_ignores=[])


@cache
def names(module: str) -> dict[str, ast.stmt | Imported]:
    """The names at a module's top level; the last binding counts. "* module" is a star import."""
    path = source(module)
    found: dict[str, ast.stmt | Imported] = {}
    if path is None:
        return found
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for statement in flat(tree(path).body):
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                target = alias.name if alias.asname else alias.name.split(".")[0]
                found[alias.asname or target] = Imported(target, "")
        elif isinstance(statement, ast.ImportFrom):
            origin = _origin(statement, package)
            for alias in statement.names:
                key = f"* {origin}" if alias.name == "*" else alias.asname or alias.name
                found[key] = Imported(origin, "" if alias.name == "*" else alias.name)
        else:
            found.update(dict.fromkeys(_bound(statement), statement))
    return found


def flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements with those inside of top-level `if`, `try` and `with`."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if isinstance(statement, (ast.If, ast.Try, ast.With)):
                yield from flat(getattr(statement, block, []))
        if isinstance(statement, ast.Try):
            for handler in statement.handlers:
                yield from flat(handler.body)


def _origin(statement: ast.ImportFrom, package: str) -> str:
    parts = package.split(".")
    base = parts[: len(parts) - statement.level + 1] if statement.level else []
    return ".".join([*base, *([statement.module] if statement.module else [])])


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
        return [statement.target.id]
    return []


@cache
def locate(target: str) -> Definition | None:
    """What a dotted name stands for, or None where it cannot be found in source."""
    parts = target.split(".")
    if not all(part.isidentifier() for part in parts):
        return None
    module = parts[0]
    rest = parts[1:]
    while len(rest) > 1 and source(f"{module}.{rest[0]}"):
        module, rest = f"{module}.{rest[0]}", rest[1:]
    return resolve(module, ".".join(rest))


def resolve(module: str, dotted: str, hops: int = 0) -> Definition | None:
    """What `dotted` means inside of `module`; "" is the module itself."""
    if not dotted:
        return Definition(module, "", tree(path)) if (path := source(module)) else None
    first, _, rest = dotted.partition(".")
    entry = names(module).get(first)
    if hops > MAX_HOPS:
        return None
    if isinstance(entry, Imported):
        return _follow(entry, rest, hops)
    if entry is None:
        stars = [key[2:] for key in names(module) if key.startswith("* ")]
        hits = (resolve(star, dotted, hops + 1) for star in stars)
        submodule = source(f"{module}.{first}")
        return next((hit for hit in hits if hit), None) or (
            resolve(f"{module}.{first}", rest, hops + 1) if submodule else None
        )
    if alias := _alias(entry):
        return resolve(module, _joined(alias, rest), hops + 1)
    return _inside(module, first, entry, rest, hops)


def _follow(entry: Imported, rest: str, hops: int) -> Definition | None:
    dotted = _joined(entry.name, rest)
    if source(entry.module) is None:
        return Definition(entry.module, dotted, ast.Pass())
    return resolve(entry.module, dotted, hops + 1)


def _joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def _alias(statement: ast.AST) -> str | None:
    """`other.name` for a statement `name = other.name`, which is a re-export and no definition."""
    value = getattr(statement, "value", None) if isinstance(statement, (ast.Assign, ast.AnnAssign)) else None
    return dotted_name(value) if isinstance(value, (ast.Name, ast.Attribute)) else None


def _inside(module: str, name: str, node: ast.stmt, rest: str, hops: int) -> Definition | None:
    """The attribute `rest` that the body of a class itself defines."""
    while rest:
        part, _, rest = rest.partition(".")
        if not isinstance(node, ast.ClassDef):
            return None
        node = next((s for s in reversed(list(flat(node.body))) if part in _bound(s)), None)  # type: ignore[assignment]
        if node is None:
            return None
        if alias := _alias(node):
            return resolve(module, _joined(alias, rest), hops + 1)
        name = f"{name}.{part}"
    return Definition(module, name, node)


def dotted_name(node: ast.AST | None) -> str:
    """`a.b.c` for a Name or an Attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def docstring(target: str) -> tuple[str, str]:
    """The docstrings of a target's module and of the target itself, "" where there is none."""
    found = locate(target)
    path = source(found.module) if found else None
    if found is None or path is None:
        return "", ""
    documented = isinstance(found.node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    own = ast.get_docstring(found.node) if documented else ""  # type: ignore[arg-type]
    return ast.get_docstring(tree(path)) or "", own or ""
