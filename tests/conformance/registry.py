"""What an adapter says: how one algorithm of the golden files is built from the menu, and what its names are here.

An adapter is a function of a golden file, registered for the `algorithm` of the file's meta:

    @adapter("RMSNorm")
    def rms(file):
        norm = build("norm_layer", "rms", {"eps": file.hyperparameters["eps"]}, file["x/1"].shape[-1])
        return Layer(norm, params={"weight": "gain"})

It returns a `Layer`, which the runner drives through the file's calls, or `Steps`, an optimizer that takes the file's
steps, or, for anything else, yields pairs (name of an array in the file, the value obtained here), which the harness
compares. It maps names and shapes and does no arithmetic; it cannot read an expected array.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.optimizer.partition import by_role, split

CONF = Path(__file__).parents[2] / "conf"
RTOL = 1e-9  # where meta gives no suggested_rtol


class File:
    """One golden file: its meta as attributes, its input arrays by name. Expected arrays are the harness's alone."""

    def __init__(self, path: Path):
        with np.load(path) as stored:
            self._arrays = {name: stored[name] for name in stored.files}
        self.meta: dict[str, Any] = json.loads(str(self._arrays.pop("meta")))
        self.algorithm: str = self.meta["algorithm"]
        self.hyperparameters: dict[str, Any] = self.meta["hyperparameters"]
        self.steps = int(self.meta["steps"])
        self.dtype: torch.dtype = getattr(torch, self.meta.get("dtype", "float64"))
        self.rtol = float(self.meta.get("suggested_rtol", RTOL))
        self.read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Tensor:
        """An input as a new tensor; floats in the file's dtype."""
        assert not name.startswith("expect/"), f"{name} is an expected array: yield what is to be compared with it"
        self.read.add(name)
        value = torch.from_numpy(np.array(self._arrays[name]))
        return value.to(self.dtype) if value.is_floating_point() else value

    def names(self, prefix: str) -> list[str]:
        """What follows `prefix/` in the names of the arrays below it."""
        return [name[len(prefix) + 1 :] for name in self._arrays if name.startswith(prefix + "/")]

    def call(self, name: str, step: int) -> Tensor | None:
        """The input `name` of training call `step` (from 1), stored one by one or stacked; None where it has none."""
        if f"{name}/{step}" in self:
            return self[f"{name}/{step}"]
        return self[f"{name}_all"][step - 1] if f"{name}_all" in self else None

    def expected(self, name: str) -> Tensor:
        """For the harness: the array that an actual value is compared with."""
        return torch.from_numpy(np.array(self._arrays[name]))

    def unused(self, compared: set[str]) -> list[str]:
        """Arrays that no comparison reached: expected ones; in a file that marks none as expected, any never used."""
        expected = [name for name in self._arrays if name.startswith("expect/")]
        candidates = expected or [name for name in self._arrays if name not in self.read]
        return sorted(set(candidates) - compared)


@dataclass
class Layer:
    """A module and how the file's names map onto it.

    params, buffers: name in the file -> name in the module; a name that is not listed is the same on both sides, and
    "down.T" is the transposed matrix `down`. Axes of size one are added or dropped as needed. inputs: name in the file
    -> keyword of forward, for what is passed beside x (`pad_mask/<t>`, `pad_mask_eval`). permute: the order of the
    file's axes that gives the module's layout, such as (1, 0, 2) for a file in T,B,C. after_call(module, step) runs
    after the backward of a training call, before its buffers are compared. extra: (array name, value) pairs compared
    at the end, in eval mode.
    """

    module: nn.Module
    params: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    permute: tuple[int, ...] | None = None
    after_call: Callable[[nn.Module, int], None] | None = None
    extra: Callable[[nn.Module], Iterable[tuple[str, Tensor]]] | None = None


@dataclass
class Steps:
    """An optimizer that takes the file's steps: `init/<p>`, then `grad/<t>/<p>` for each, against `expect/<t>/<p>`.

    make(model) builds it for a model whose parameters have the file's names; those with two axes or more have the
    role "matrix", the others "vector". before(model, optimizer, t) runs between setting the gradients of step t and
    taking it; after(model, optimizer, t) yields further pairs to compare.
    """

    make: Callable[[nn.Module], Optimizer]
    before: Callable[[nn.Module, Optimizer, int], None] | None = None
    after: Callable[[nn.Module, Optimizer, int], Iterable[tuple[str, Any]]] | None = None
    displacement: bool = False  # compare what each step moved, by Frobenius norm (for files in half precision)


Pairs = Iterator[tuple[str, Any]]
Adapter = Callable[[File], "Layer | Steps | Pairs"]


@dataclass(frozen=True)
class Entry:
    function: Adapter
    rtol: Mapping[str, float]


_entries: dict[str, Entry] = {}


def adapter(*algorithms: str, rtol: Mapping[str, float] | None = None) -> Callable[[Adapter], Adapter]:
    """Registers a function for these values of meta.algorithm; one that ends in * stands for all that begin so.

    rtol: tolerances of single arrays that their README states (such as those computed in float32).
    """

    def register(function: Adapter) -> Adapter:
        for algorithm in algorithms:
            assert algorithm not in _entries, f"two adapters for {algorithm}"
            _entries[algorithm] = Entry(function, rtol or {})
        return function

    return register


def find(algorithm: str) -> Entry | None:
    """The entry for an algorithm: its exact name first, then the longest prefix."""
    if algorithm in _entries:
        return _entries[algorithm]
    prefixes = [name for name in _entries if name.endswith("*") and algorithm.startswith(name[:-1])]
    return _entries[max(prefixes, key=len)] if prefixes else None


def plugin(group: str, name: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings in conf/<group>/<name>.yaml with `overrides`, each of which must be a key there.

    Groups within the group are filled in with what the file chooses from them (optimizer/rest).
    """
    path = CONF / group / f"{name}.yaml"
    settings = OmegaConf.load(path)
    if "# @package _global_" in path.read_text():
        settings = settings[group]
    for entry in settings.pop("defaults", ()):
        chosen = {inner: option for inner, option in entry.items() if option} if entry != "_self_" else {}
        settings.update({inner: plugin(f"{group}/{inner}", option) for inner, option in chosen.items()})
    for key in overrides or {}:
        assert key in settings, f"{path.relative_to(CONF.parent)} has no key {key}"
    merged = OmegaConf.merge(settings, dict(overrides or {}))
    return OmegaConf.to_container(merged, resolve=False)  # type: ignore[return-value]


def build(group: str, name: str, overrides: Mapping[str, Any] | None = None, /, *args: Any, **keywords: Any) -> Any:
    """What conf/<group>/<name>.yaml instantiates with `overrides`, called with the arguments if it is a factory.

    A keyword `<other group>=plugin(...)` supplies what the file's interpolations such as ${norm_layer} refer to.
    """
    root = {key: keywords.pop(key) for key in list(keywords) if (CONF / key).is_dir()}
    made = instantiate(OmegaConf.create({**root, group: plugin(group, name, overrides)}))[group]
    return made(*args, **keywords) if args or keywords else made


def optimizer(name: str, overrides: Mapping[str, Any] | None = None) -> Callable[[nn.Module], Optimizer]:
    """model -> the optimizer of conf/optimizer/<name>.yaml, which steps the roles it takes, its `rest` the others."""
    factory, words = split(build("optimizer", name, overrides))
    return lambda model: by_role(model, factory, **words)
