"""Arrows point one way: leaves reach only torch, the standard library and trainkit's own interfaces."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = ("model", "norm", "norm_layer", "optimizer", "schedule", "gradient", "projection", "continual", "learner")
LEAVES += ("measure", "plan")
HYDRA_ONLY_IN = ("launch",)
LIGHTNING_ONLY_IN = ("launch", "task", "data", "bench", "report")


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def files(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


@pytest.mark.parametrize(
    "path", files(*(f"trainkit/{leaf}" for leaf in LEAVES)), ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_leaf_imports_torch_the_standard_library_and_interfaces(path):
    for module in imports(path):
        top = module.split(".")[0]
        assert top in sys.stdlib_module_names | {"torch", "trainkit"}, f"{path} imports {module}"
        if top == "trainkit":
            assert module.split(".")[1] in (*LEAVES, "surgery"), f"{path} imports {module}"


def test_hydra_stays_where_runs_are_composed():
    for path in files("trainkit", "callbacks"):
        if path.relative_to(ROOT).parts[1] not in HYDRA_ONLY_IN:
            assert not {m for m in imports(path) if m.split(".")[0] in ("hydra", "omegaconf")}, path


def test_lightning_stays_out_of_leaves():
    for path in files("trainkit"):
        if path.relative_to(ROOT).parts[1] not in LIGHTNING_ONLY_IN:
            assert not {m for m in imports(path) if m.split(".")[0] == "lightning"}, path


def test_nothing_below_the_callbacks_knows_them():
    for path in files("trainkit"):
        assert not {m for m in imports(path) if m.split(".")[0] == "callbacks"}, path
