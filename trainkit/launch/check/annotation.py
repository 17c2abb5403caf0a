"""Does a YAML value fit a parameter's annotation? Answered from the annotation's source, without importing anything."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

from trainkit.launch.check.definition import dotted_name, resolve
from trainkit.launch.check.signature import Parameter

LISTS = {"list", "List", "tuple", "Tuple", "Sequence", "Iterable", "Collection", "set", "Set"}
DICTS = {"dict", "Dict", "Mapping", "MutableMapping"}
OBJECTS = {"Tensor", "Module", "Callable", "Optimizer", "Placement"}  # what no plain YAML value can be
ANYTHING = {"Any", "object"}
MAX_DEPTH = 8


def fits(parameter: Parameter, value: Any) -> bool | None:
    """True or False where the annotation decides, None where it is absent or not understood."""
    return _fits(parameter.annotation, value, parameter.module, 0)


def choices(parameter: Parameter) -> list[str]:
    """The texts that an annotation names in Literal[...]."""
    return sorted(_literals(parameter.annotation, parameter.module, 0))


def written(parameter: Parameter) -> str:
    """The annotation as its source has it."""
    return ast.unparse(parameter.annotation) if parameter.annotation else "anything"


def _fits(annotation: ast.expr | None, value: Any, module: str, depth: int) -> bool | None:
    if annotation is None or depth > MAX_DEPTH:
        return None
    if isinstance(value, dict) and "_target_" in value:
        return True  # built into an object whose type is not known here
    if isinstance(annotation, ast.Constant):
        quoted = _unquoted(annotation)
        return value is None if annotation.value is None else _fits(quoted, value, module, depth + 1)
    if isinstance(annotation, ast.BinOp):
        return _any(_fits(side, value, module, depth + 1) for side in (annotation.left, annotation.right))
    if isinstance(annotation, ast.Subscript):
        return _fits_generic(annotation, value, module, depth)
    return _fits_name(dotted_name(annotation), value, module, depth)


def _fits_name(name: str, value: Any, module: str, depth: int) -> bool | None:
    kind = name.rpartition(".")[2]
    if kind in ("int", "float", "bool", "str", "None"):
        return type(value).__name__ in {"float": ("float", "int"), "None": ("NoneType",)}.get(kind, (kind,))
    if kind in ("Path", "PathLike"):
        return isinstance(value, str)
    if kind in LISTS:
        return isinstance(value, list)
    if kind in DICTS:
        return isinstance(value, dict)
    if kind in OBJECTS:
        return False
    alias = _alias(name, module)
    return _fits(alias[0], value, alias[1], depth + 1) if alias else None


def _fits_generic(annotation: ast.Subscript, value: Any, module: str, depth: int) -> bool | None:
    kind, inner = dotted_name(annotation.value).rpartition(".")[2], _arguments(annotation)

    def fits_inner(argument: ast.expr, part: Any) -> bool | None:
        return _fits(argument, part, module, depth + 1)

    if kind == "Optional":
        return value is None or fits_inner(inner[0], value)
    if kind == "Union":
        return _any(fits_inner(argument, value) for argument in inner)
    if kind == "Annotated":
        return fits_inner(inner[0], value)
    if kind == "Literal":
        return any(isinstance(a, ast.Constant) and a.value == value and type(a.value) is type(value) for a in inner)
    if kind in LISTS:
        if not isinstance(value, list):
            return False
        of_one_type = kind not in ("tuple", "Tuple") or isinstance(inner[-1], ast.Constant)
        if not of_one_type and len(inner) != len(value):
            return False
        return _all(fits_inner(inner[0] if of_one_type else inner[i], part) for i, part in enumerate(value))
    if kind in DICTS:
        return isinstance(value, dict)
    return False if kind in OBJECTS else None


def _arguments(annotation: ast.Subscript) -> list[ast.expr]:
    return annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]


def _unquoted(annotation: ast.Constant) -> ast.expr | None:
    try:
        return ast.parse(str(annotation.value), mode="eval").body
    except SyntaxError:
        return None


def _alias(name: str, module: str) -> tuple[ast.expr, str] | None:
    """The type expression that a name stands for (`Precision = Literal[...]`) and the module to read it in."""
    found = resolve(module, name) if name and name.rpartition(".")[2] not in ANYTHING else None
    value = getattr(found.node, "value", None) if found else None
    return (value, found.module) if found and isinstance(value, (ast.Subscript, ast.BinOp)) else None


def _literals(annotation: ast.expr | None, module: str, depth: int) -> set[str]:
    if annotation is None or depth > MAX_DEPTH:
        return set()
    if isinstance(annotation, ast.BinOp):
        return _literals(annotation.left, module, depth + 1) | _literals(annotation.right, module, depth + 1)
    if isinstance(annotation, ast.Subscript):
        inner = _arguments(annotation)
        if dotted_name(annotation.value).rpartition(".")[2] == "Literal":
            return {str(a.value) for a in inner if isinstance(a, ast.Constant)}
        return set().union(*(_literals(argument, module, depth + 1) for argument in inner))
    alias = _alias(dotted_name(annotation), module)
    return _literals(alias[0], alias[1], depth + 1) if alias else set()


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    unknown = False
    for verdict in verdicts:
        if verdict:
            return True
        unknown = unknown or verdict is None
    return None if unknown else False


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    found = list(verdicts)
    return False if False in found else None if None in found else True
