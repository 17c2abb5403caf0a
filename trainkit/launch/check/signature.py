"""Which keywords a callable takes, read from its source without importing it.

What cannot be read so (compiled code, unusual class machinery) has no signature here and stays unchecked.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache

from trainkit.launch.check.definition import MAX_HOPS, Definition, Imported, dotted_name, flat, locate, names, resolve

# Bases that add no keyword of their own. nn.Module is named because its file is long and its own __init__ refuses all.
PLAIN_BASES = {"object", "torch.nn.Module", "abc.ABC", "typing.Generic", "typing.Protocol"}


@dataclass(frozen=True)
class Parameter:
    """A keyword of a callable; its annotation is to be read in the module that defines it."""

    name: str
    annotation: ast.expr | None
    required: bool
    module: str
    keyword_only: bool = False


@dataclass
class Signature:
    """The keywords that a callable takes. open: it has **kwargs, so other keywords may be legal as well."""

    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False


@cache
def signature(target: str) -> Signature | None:
    """The keywords of a target, or None where its source does not tell."""
    found = locate(target)
    return _signature(found) if found else None


def _signature(found: Definition, depth: int = 0) -> Signature | None:
    if isinstance(found.node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        in_class = "." in found.name
        return _of_function(found.node, found.module, bound=in_class and not _is_static(found.node))
    if isinstance(found.node, ast.ClassDef) and depth < MAX_HOPS:
        return _of_class(found, depth)
    return None


def _is_static(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(dotted_name(decorator) == "staticmethod" for decorator in function.decorator_list)


def _of_function(function: ast.FunctionDef | ast.AsyncFunctionDef, module: str, *, bound: bool) -> Signature:
    spec = function.args
    plain = [*spec.posonlyargs, *spec.args]
    optional = {arg.arg for arg in plain[len(plain) - len(spec.defaults) :]} if spec.defaults else set()
    optional |= {arg.arg for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if default is not None}
    by_name = [arg for arg in plain[bound:] if arg not in spec.posonlyargs] + spec.kwonlyargs
    parameters = {
        arg.arg: Parameter(arg.arg, arg.annotation, arg.arg not in optional, module, arg in spec.kwonlyargs)
        for arg in by_name
    }
    return Signature(parameters, open=spec.kwarg is not None)


def _of_class(found: Definition, depth: int) -> Signature | None:
    node = found.node
    assert isinstance(node, ast.ClassDef)
    methods = {s.name: s for s in flat(node.body) if isinstance(s, ast.FunctionDef)}
    if "__init__" in methods:
        return _of_function(methods["__init__"], found.module, bound=True)
    if "__new__" in methods or node.keywords:
        return None
    if any(dotted_name(d.func if isinstance(d, ast.Call) else d).endswith("dataclass") for d in node.decorator_list):
        return _of_fields(found, depth)
    for base in node.bases:
        name = dotted_name(base.value if isinstance(base, ast.Subscript) else base)
        if _full_name(found.module, name) in PLAIN_BASES:
            continue
        parent = resolve(found.module, name) if name else None
        return _signature(parent, depth + 1) if parent else None
    return Signature()


def _full_name(module: str, name: str) -> str:
    """`torch.nn.Module` for `nn.Module` in a module that says `from torch import nn`."""
    first, _, rest = name.partition(".")
    entry = names(module).get(first)
    if not isinstance(entry, Imported):
        return name
    return ".".join(part for part in (entry.module, entry.name, rest) if part)


def _of_fields(found: Definition, depth: int) -> Signature | None:
    """The keywords of a dataclass: its bases' fields, then its own."""
    node = found.node
    assert isinstance(node, ast.ClassDef)
    signature = Signature()
    for base in reversed(node.bases):
        parent = resolve(found.module, dotted_name(base))
        inherited = _signature(parent, depth + 1) if parent else None
        if inherited is None:
            return None
        signature.parameters.update(inherited.parameters)
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            annotation, name = statement.annotation, statement.target.id
            if "ClassVar" in ast.dump(annotation) or _keyword(statement.value, "init") is False:
                continue
            given = statement.value is not None and (
                not isinstance(statement.value, ast.Call)
                or dotted_name(statement.value.func).rpartition(".")[2] != "field"
                or any(k.arg in ("default", "default_factory") for k in statement.value.keywords)
            )
            signature.parameters[name] = Parameter(name, annotation, not given, found.module)
    return signature


def _keyword(value: ast.expr | None, name: str) -> object:
    if isinstance(value, ast.Call):
        return next((getattr(k.value, "value", None) for k in value.keywords if k.arg == name), None)
    return None
