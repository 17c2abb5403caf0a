"""A function's source evaluated on values, as far as it is certain what would happen; nothing is imported or run.

Only what certainly happens counts: whatever depends on something that is not known before the run (data, models,
other objects) is UNKNOWN, and so is everything behind it where it might have ended the function.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from typing import Any

from trainkit.launch.check.definition import Definition, Imported, dotted_name, flat, names, resolve
from trainkit.launch.check.targets import NOT_PLUGINS, PACKAGES

MAX_DEPTH = 8  # calls within calls that are followed; in others' packages one, the constructor of a base
MAX_ITEMS = 100  # rounds of a loop that are followed


class Unknown:
    """A value that only the run will know."""

    def __repr__(self) -> str:
        return "…"


UNKNOWN = Unknown()
HARMLESS = (abs, all, any, bool, dict, float, int, len, list, max, min, range, round, set, str, sum, tuple)
BUILTINS: dict[str, Callable[..., Any]] = {function.__name__: function for function in HARMLESS}
METHODS = {dict: {"get", "items", "keys", "values"}, str: {"join", "lower", "startswith", "endswith", "split"}}
TYPES = {"bool": bool, "dict": dict, "float": float, "int": int, "list": list, "str": str, "tuple": tuple}
BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.BitOr: operator.or_,
}  # fmt: skip
COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip
UNARY: dict[type, Callable[[Any], Any]] = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}


class Refused(Exception):
    """The guard that raises, with its message."""


class Over(Exception):
    """The function returns, or nothing certain can be said about the rest of it."""


def call(
    found: Definition,
    args: list[Any],
    keywords: dict[str, Any],
    *,
    depth: int,
    attributes: dict[str, Any] | None = None,
) -> Any:
    """Evaluates a function, or the constructor of a class, whose result is UNKNOWN. What is not given is UNKNOWN too.

    attributes: those of the object whose class's constructor calls its base's.
    """
    attributes = {} if attributes is None else attributes
    node, owner = found.node, None
    if isinstance(node, ast.ClassDef):
        methods = {s.name: s for s in flat(node.body) if isinstance(s, ast.FunctionDef)}
        made = methods.get("__init__")
        if made is None and any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            keywords = attributes = _fields(node) | keywords
            made = methods.get("__post_init__")
        if made is None:
            base = _base(found) if depth < MAX_DEPTH else None
            return UNKNOWN if base is None else call(base, args, keywords, depth=depth + 1, attributes=attributes)
        node, args, owner = made, [UNKNOWN, *args], found
    if not isinstance(node, ast.FunctionDef) or any(dotted_name(d) != "staticmethod" for d in node.decorator_list):
        return UNKNOWN
    local = _bind(node, args, keywords)
    returned = Frame(found.module, local, owner, attributes, depth).run(node.body)
    return returned if owner is None else UNKNOWN


def _nearby(module: str, name: str) -> Definition | None:
    """What a name means in a module, if it is defined in the same package; others' files are long and rarely help."""
    bound = names(module).get(name.split(".")[0])
    if isinstance(bound, Imported) and bound.module.split(".")[0] != module.split(".")[0]:
        return None
    return resolve(module, name) if name else None


def _base(found: Definition) -> Definition | None:
    """The first base of a class that is defined in the same package."""
    assert isinstance(found.node, ast.ClassDef)
    bases = (_nearby(found.module, dotted_name(base)) for base in found.node.bases)
    return next((base for base in bases if base is not None and isinstance(base.node, ast.ClassDef)), None)


def _fields(node: ast.ClassDef) -> dict[str, Any]:
    """The defaults of a dataclass's fields; one that is no literal is unknown."""
    fields: dict[str, Any] = {}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields[statement.target.id] = _literal(statement.value)
    return fields


def _literal(node: ast.expr | None) -> Any:
    try:
        return UNKNOWN if node is None else ast.literal_eval(node)
    except (ValueError, TypeError):
        return UNKNOWN


def _bind(function: ast.FunctionDef, args: list[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """The function's parameters by name; one that is not given has its default, or is unknown."""
    spec = function.args
    plain = [arg.arg for arg in (*spec.posonlyargs, *spec.args)]
    local: dict[str, Any] = dict.fromkeys([*plain, *(arg.arg for arg in spec.kwonlyargs)], UNKNOWN)
    for name, default in zip(plain[len(plain) - len(spec.defaults) :], spec.defaults, strict=True):
        local[name] = _literal(default)
    for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        local[arg.arg] = _literal(default)
    local |= dict(zip(plain, args, strict=False))
    rest = {name: value for name, value in keywords.items() if name not in local}
    local |= {name: value for name, value in keywords.items() if name in local}
    if spec.kwarg is not None:
        local[spec.kwarg.arg] = rest
    if spec.vararg is not None:
        local[spec.vararg.arg] = tuple(args[len(plain) :])
    return local


class Frame:
    """One call: its local names, and the attributes that `self` has got so far."""

    def __init__(
        self, module: str, local: dict[str, Any], owner: Definition | None, attributes: dict[str, Any], depth: int
    ):
        self.module, self.local, self.owner, self.attributes, self.depth = module, local, owner, attributes, depth

    # --- statements -------------------------------------------------------------------------------------------------

    def run(self, statements: list[ast.stmt]) -> Any:
        """What the function returns."""
        try:
            self.body(statements)
        except Over as over:
            return over.args[0] if over.args else UNKNOWN
        return None

    def body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.statement(statement)

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr):
            self.value(node.value)
        elif isinstance(node, ast.Assign):
            value = self.value(node.value)
            for target in node.targets:
                self.assign(target, value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, self.value(node.value))
        elif isinstance(node, ast.AugAssign):
            value = self.value(ast.BinOp(_loaded(node.target), node.op, node.value))
            self.spoil(node.target)  # a list is changed in place, under its other names too
            self.assign(node.target, value)
        elif isinstance(node, ast.Return):
            raise Over(None if node.value is None else self.value(node.value))
        elif isinstance(node, ast.Raise):
            self.raised(node)
        elif isinstance(node, ast.If) and (known := self.truth(node.test)) is not UNKNOWN:
            self.body(node.body if known else node.orelse)
        elif isinstance(node, ast.For) and (items := self.items(self.value(node.iter))) is not None:
            for item in items:
                self.assign(node.target, item)
                self.body(node.body)
        elif not isinstance(node, (ast.Pass, ast.Assert, ast.Global, ast.Nonlocal)):
            self.forget(node)

    def raised(self, node: ast.Raise) -> None:
        call = node.exc
        if isinstance(call, ast.Call) and dotted_name(call.func) == "ValueError" and call.args:
            raise Refused(str(self.value(call.args[0])))
        raise Over

    def forget(self, node: ast.stmt) -> None:
        """Passes over what may or may not happen: what it sets is unknown, and if it may leave, so is the rest."""
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.local[node.name] = UNKNOWN
            return
        for inner in ast.walk(node):
            if isinstance(inner, (ast.Return, ast.Break, ast.Continue, ast.Yield, ast.YieldFrom)):
                raise Over
            if isinstance(inner, (ast.Name, ast.Attribute)) and isinstance(inner.ctx, (ast.Store, ast.Del)):
                self.assign(inner, UNKNOWN)
            elif isinstance(inner, ast.alias):
                self.local[(inner.asname or inner.name).split(".")[0]] = UNKNOWN
        self.spoil(node)

    def spoil(self, node: ast.AST) -> None:
        """Forgets the lists, dicts and sets that `node` mentions: it may change them."""
        mentioned = [self.value(e) for e in ast.walk(node) if isinstance(e, (ast.Name, ast.Attribute))]
        changed = [value for value in mentioned if isinstance(value, (list, dict, set))]
        for place in (self.local, self.attributes):
            for name, value in place.items():
                if any(value is one for one in changed):
                    place[name] = UNKNOWN

    def assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.local[target.id] = value
        elif isinstance(target, ast.Attribute) and dotted_name(target.value) == "self":
            self.attributes[target.attr] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            items = self.items(value)
            fits = items is not None and len(items) == len(target.elts)
            for place, item in zip(target.elts, items if fits and items else [UNKNOWN] * len(target.elts), strict=True):
                self.assign(place, item)

    def items(self, value: Any) -> list[Any] | None:
        """What a loop goes through, or None where that is not known or long."""
        if not isinstance(value, (list, tuple, dict, range, set)) or len(value) > MAX_ITEMS:
            return None
        return list(value)

    # --- expressions ------------------------------------------------------------------------------------------------

    def value(self, node: ast.expr) -> Any:
        """The value of an expression, UNKNOWN where it is not known or its evaluation fails."""
        evaluate = getattr(self, f"on_{type(node).__name__.lower()}", None)
        try:
            return UNKNOWN if evaluate is None else evaluate(node)
        except (Refused, Over):
            raise
        except Exception:  # the constructor will fail in the same way, and say so
            return UNKNOWN

    def truth(self, node: ast.expr) -> Any:
        value = self.value(node)
        return bool(value) if certain(value) else UNKNOWN

    def on_constant(self, node: ast.Constant) -> Any:
        return node.value

    def on_name(self, node: ast.Name) -> Any:
        if node.id in self.local:
            return self.local[node.id]
        bound = names(self.module).get(node.id)
        return _literal(bound.value) if isinstance(bound, (ast.Assign, ast.AnnAssign)) else UNKNOWN

    def on_attribute(self, node: ast.Attribute) -> Any:
        return self.attributes.get(node.attr, UNKNOWN) if dotted_name(node.value) == "self" else UNKNOWN

    def on_tuple(self, node: ast.Tuple) -> Any:
        return tuple(self.elements(node.elts))

    def on_list(self, node: ast.List) -> Any:
        return list(self.elements(node.elts))

    def on_set(self, node: ast.Set) -> Any:
        return set(self.elements(node.elts))

    def elements(self, nodes: list[ast.expr]) -> Iterator[Any]:
        for node in nodes:
            if isinstance(node, ast.Starred):
                yield from self.value(node.value)  # an unknown one fails, and makes the whole unknown
            else:
                yield self.value(node)

    def on_dict(self, node: ast.Dict) -> Any:
        made: dict[Any, Any] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            made |= self.value(value) if key is None else {self.value(key): self.value(value)}
        return made

    def on_joinedstr(self, node: ast.JoinedStr) -> str:
        return "".join(self.text(part) for part in node.values)

    def text(self, part: ast.expr) -> str:
        if not isinstance(part, ast.FormattedValue):
            return str(self.value(part))
        value = self.value(part.value)
        if not certain(value):
            return repr(UNKNOWN)
        shape = self.on_joinedstr(part.format_spec) if isinstance(part.format_spec, ast.JoinedStr) else ""
        return format({-1: value, 115: str(value), 114: repr(value), 97: ascii(value)}[part.conversion], shape)

    def on_binop(self, node: ast.BinOp) -> Any:
        left, right = self.value(node.left), self.value(node.right)
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        joins = isinstance(node.op, (ast.Add, ast.BitOr)) and type(left) is type(right)
        return BINARY[type(node.op)](left, right) if numbers or joins else UNKNOWN

    def on_unaryop(self, node: ast.UnaryOp) -> Any:
        value = self.value(node.operand)
        return UNARY[type(node.op)](value) if certain(value) else UNKNOWN

    def on_boolop(self, node: ast.BoolOp) -> Any:
        stops = isinstance(node.op, ast.Or)
        for operand in node.values:
            value = self.value(operand)
            if not certain(value) or bool(value) is stops:
                return value if certain(value) else UNKNOWN
        return value

    def on_compare(self, node: ast.Compare) -> Any:
        left = self.value(node.left)
        for symbol, operand in zip(node.ops, node.comparators, strict=True):
            right = self.value(operand)
            if not certain(left) or not certain(right):
                return UNKNOWN
            if not COMPARE[type(symbol)](left, right):
                return False
            left = right
        return True

    def on_ifexp(self, node: ast.IfExp) -> Any:
        known = self.truth(node.test)
        return UNKNOWN if known is UNKNOWN else self.value(node.body if known else node.orelse)

    def on_subscript(self, node: ast.Subscript) -> Any:
        value, index = self.value(node.value), self.value(node.slice)
        return value[index] if isinstance(value, (list, tuple, dict)) and certain(index) else UNKNOWN

    def on_generatorexp(self, node: ast.GeneratorExp | ast.ListComp | ast.SetComp) -> Any:
        (loop,) = node.generators  # nested loops fail, and are unknown
        items = self.items(self.value(loop.iter))
        if items is None or loop.is_async:
            return UNKNOWN
        inner = {n.id for n in ast.walk(loop.target) if isinstance(n, ast.Name)}
        hidden, made = {name: self.local[name] for name in inner & set(self.local)}, []
        for item in items:
            self.assign(loop.target, item)
            kept = [self.truth(test) for test in loop.ifs]
            if UNKNOWN in kept:
                return UNKNOWN
            if all(kept):
                made.append(self.value(node.elt))
        self.local = {name: value for name, value in self.local.items() if name not in inner} | hidden
        return made

    on_listcomp = on_setcomp = on_generatorexp

    def on_call(self, node: ast.Call) -> Any:
        name = dotted_name(node.func)
        args = list(self.elements(node.args))
        keywords: dict[str, Any] = {}
        for keyword in node.keywords:
            keywords |= self.value(keyword.value) if keyword.arg is None else {keyword.arg: self.value(keyword.value)}
        if name == "getattr" and dotted_name(node.args[0]) == "self":
            return self.attributes.get(args[1], UNKNOWN)
        if name == "isinstance":
            return _is_instance(args[0], node.args[1])
        if name in BUILTINS and name not in self.local and name not in names(self.module):
            fine = all(certain(arg) and len(self.items(arg) or ()) <= MAX_ITEMS for arg in (*args, *keywords.values()))
            return BUILTINS[name](*args, **keywords) if fine else UNKNOWN
        if (made := self.method(node, args, keywords)) is not UNKNOWN:
            return made
        made = self.called(node, name, args, keywords)
        self.spoil(node)
        return made

    def called(self, node: ast.Call, name: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        """What a function gives that may do anything to its arguments."""
        ours = self.module.split(".")[0] in PACKAGES or self.module.split(".")[0] not in NOT_PLUGINS
        deep = self.depth >= (MAX_DEPTH if ours else 1)
        if self.owner is not None and ast.unparse(node.func) == "super().__init__":
            base = None if deep else _base(self.owner)
            return (
                None if base is None else call(base, args, keywords, depth=self.depth + 1, attributes=self.attributes)
            )
        if name.startswith("self."):
            self.attributes.clear()
        known = name and name.split(".")[0] not in self.local and not deep
        found = _nearby(self.module, name) if known else None
        return UNKNOWN if found is None else call(found, args, keywords, depth=self.depth + 1)

    def method(self, node: ast.Call, args: list[Any], keywords: dict[str, Any]) -> Any:
        """What a method of a plain value gives, if it is one that changes nothing."""
        if not isinstance(node.func, ast.Attribute):
            return UNKNOWN
        owner = self.value(node.func.value)
        known = node.func.attr in METHODS.get(type(owner), ()) and all(map(certain, (*args, *keywords.values())))
        if not known:
            return UNKNOWN
        made = getattr(owner, node.func.attr)(*args, **keywords)
        return list(made) if node.func.attr in ("items", "keys", "values") else made


def certain(value: Any) -> bool:
    """Whether a value is known, and all that is in it."""
    if isinstance(value, dict):
        return all(map(certain, value.values()))
    return all(map(certain, value)) if isinstance(value, (list, tuple, set)) else value is not UNKNOWN


def _is_instance(value: Any, kinds: ast.expr) -> Any:
    """isinstance for plain values: builtin types are told apart, and a tensor or a module is never one of them."""
    if not certain(value):
        return UNKNOWN
    listed = kinds.elts if isinstance(kinds, ast.Tuple) else [kinds]
    verdicts = []
    for kind in listed:
        name = dotted_name(kind)
        if name in TYPES:
            verdicts.append(isinstance(value, TYPES[name]))
        else:
            verdicts.append(False if name.rpartition(".")[2] in ("Tensor", "Module") else UNKNOWN)
    return True if True in verdicts else UNKNOWN if UNKNOWN in verdicts else False


def _loaded(target: ast.expr) -> ast.expr:
    return ast.parse(ast.unparse(target), mode="eval").body
