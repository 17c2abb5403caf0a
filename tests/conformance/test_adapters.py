"""Adapters map names and shapes: arithmetic in one could make a wrong plugin pass."""

import ast
from pathlib import Path

import pytest
import torch

ADAPTERS = sorted(Path(__file__).with_name("adapters").glob("*.py"))
ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow, ast.MatMult)
IMPORTS = {"torch", "typing", "collections", "dataclasses", "functools", "itertools", "copy", "re", "trainkit"}
REDUCING_BUILTINS = {"sum", "pow", "abs", "max", "min", "round", "divmod"}
OF_TORCH = {
    *("torch.as_tensor", "torch.cat", "torch.enable_grad", "torch.no_grad", "torch.stack", "torch.tensor"),
    *("torch.zeros", "torch.ones", "torch.arange", "torch.manual_seed", "torch.autograd.grad"),
    *("torch.autograd.backward", "torch.zeros_like", "torch.ones_like"),
}
OF_TENSORS = {
    *("backward", "bool", "chunk", "clone", "contiguous", "copy_", "detach", "dim", "double", "expand", "flatten"),
    *("item", "long", "movedim", "numel", "permute", "requires_grad_", "reshape", "retain_grad", "select", "size"),
    *("split", "squeeze", "swapaxes", "to", "tolist", "transpose", "t", "type_as", "unbind", "unflatten", "unsqueeze"),
    *("values", "view", "register_hook", "index_select", "diagonal", "narrow", "apply_"),
}


def offences(source: str) -> list[str]:
    """Every place in `source` that could compute with a tensor."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.expr | ast.stmt) else ""
        if (
            (isinstance(node, ast.BinOp) and isinstance(node.op, ARITHMETIC) and not plain(node))
            or (isinstance(node, ast.AugAssign) and isinstance(node.op, ARITHMETIC) and not plain(node.value))
            or (
                isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert) and not plain(node.operand)
            )
            or (isinstance(node, ast.Name) and node.id in REDUCING_BUILTINS)
            or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not allowed(node.func))
        ):
            found.append(f"line {node.lineno}: {text}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            relative = isinstance(node, ast.ImportFrom) and node.level > 0
            if not relative and any(m.split(".")[0] not in IMPORTS or m == "torch.nn.functional" for m in modules):
                found.append(f"line {node.lineno}: {text}")
            if isinstance(node, ast.ImportFrom) and any(alias.name == "functional" for alias in node.names):
                found.append(f"line {node.lineno}: {text}")
    return found


def plain(node: ast.expr) -> bool:
    """Whether an expression can only be a Python number or a string: constants, int(…), len(…), and sums of those."""
    if isinstance(node, ast.BinOp):
        return plain(node.left) and plain(node.right)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in {"int", "len", "str"}
    return isinstance(node, ast.Constant | ast.JoinedStr)


def allowed(node: ast.Attribute) -> bool:
    """Calls of torch.<name> from a short list; of a name that tensors have as a method only if it moves or shapes."""
    owner = ast.unparse(node.value)
    if owner.split(".")[0] in {"torch", "nn"} or ".functional" in owner:
        return f"{owner}.{node.attr}" in OF_TORCH or (owner in {"nn", "torch.nn"} and node.attr in vars(torch.nn))
    if owner == "super()" or owner == "self":
        return True
    return not callable(getattr(torch.Tensor, node.attr, None)) or node.attr in OF_TENSORS


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_no_arithmetic(path: Path) -> None:
    assert not offences(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "y = a @ b",
        "y = 2 * x",
        "y = x - 1",
        "x += gy",
        "y = -x",
        "y = torch.tanh(x)",
        "y = torch.nn.functional.silu(x)",
        "from torch.nn import functional as F",
        "y = nn.functional.silu(x)",
        "import numpy as np",
        "y = x.mean(0)",
        "y = x.mul_(w)",
        "y = sum(parts)",
    ],
)
def test_arithmetic_is_seen(line: str) -> None:
    assert offences(line)


@pytest.mark.parametrize(
    "line",
    [
        "y = 'in_norm.' + str(i)",
        "n = int(a) * int(b)",
        "y = x.movedim(0, -1).T",
        "f = nn.Sequential(nn.Linear(3, 3), nn.Tanh())",
        "y = norm.around(f, site)",
    ],
)
def test_names_and_shapes_are_free(line: str) -> None:
    assert not offences(line)
