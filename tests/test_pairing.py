"""Each YAML has its file and each leaf its YAML; every key is a parameter of its target."""

import ast
import importlib
import inspect
from functools import cache
from pathlib import Path

import pytest
import yaml

from trainkit.optimizer.partition import WORDS

ROOT = Path(__file__).parents[1]
STREAMS = ("task_stream", "tasks")  # every data=split_*, permuted_*, … is made of the same two
PLUGINS = ("norm", "norm_layer", "schedule", "gradient", "projection", "continual", "learner", "data", "task")


def nodes(value):
    """Every mapping with a _target_ in a YAML file."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value
        for child in value.values():
            yield from nodes(child)
    elif isinstance(value, list):
        for child in value:
            yield from nodes(child)


@cache
def every_target():
    found = []
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        for node in nodes(yaml.safe_load(path.read_text())):
            name = f"{path.relative_to(ROOT / 'conf')}:{node['_target_'].split('.')[-1]}"
            found.append(pytest.param(path, node, id=name))
    return found


@pytest.mark.parametrize(("path", "node"), every_target())
def test_each_key_is_a_parameter_of_its_target(path, node):
    module, _, name = node["_target_"].rpartition(".")
    target = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    fed = set(WORDS) if path.parent.name == "optimizer" else set()
    keys = {k for k in node if not k.startswith("_")} - fed - {"defaults"}
    assert keys <= set(parameters), f"{path}: {keys - set(parameters)}"


@cache
def imported() -> set[str]:
    """Every module that something in trainkit imports."""
    found = set()
    for path in (ROOT / "trainkit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("group", PLUGINS)
def test_each_leaf_has_its_yaml_of_the_same_name(group):
    """A file without one is an interface or a helper, so somebody imports it."""
    targets = {param.values[1]["_target_"].rpartition(".")[0] for param in every_target()}
    for path in (ROOT / "trainkit" / group).glob("[!_]*.py"):
        assert f"trainkit.{group}.{path.stem}" in targets | imported(), f"{path} has no YAML"
    for path in (ROOT / "conf" / group).glob("*.yaml"):
        for node in nodes(yaml.safe_load(path.read_text())):
            if node["_target_"].startswith(f"trainkit.{group}.") and path.stem != "none":
                file = node["_target_"].split(".")[2]
                assert file == path.stem or file in STREAMS, path
