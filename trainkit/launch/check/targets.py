"""Checks of `_target_`: which names a configuration may call, and with which keywords.

A configuration may come from somebody else's checkpoint, and instantiating it calls what it names. So a target must
be defined in trainkit, callbacks or a package that the user names in `plugins`, or be one of the exact targets that
the shipped conf/ uses. A rule by prefix would not do: torch.utils.collect_env.run starts a shell.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from trainkit.launch.check.annotation import choices as literals
from trainkit.launch.check.annotation import fits, written
from trainkit.launch.check.composition import Composition, select, walk
from trainkit.launch.check.definition import locate, names
from trainkit.launch.check.signature import Parameter, Signature, signature
from trainkit.launch.explain import UserError, did_you_mean, listed, shown
from trainkit.launch.sources import CONF

PACKAGES = ("trainkit", "callbacks")
MACHINERY = ("trainkit.launch", "trainkit.report", "trainkit.bench")  # they start processes and write files
NOT_PLUGINS = {"trainkit", "callbacks", "torch", "lightning", "hydra", "omegaconf", "numpy", "yaml", "wandb"}
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}

# Keywords that are split off before a group's target is called, and the function that takes them.
HOSTS = {
    "optimizer": "trainkit.optimizer.partition.by_role",
    "optimizer.base": "trainkit.optimizer.partition.over_roles",
}


@lru_cache
def shipped() -> frozenset[str]:
    """Every target that occurs in the shipped conf/."""
    found = (re.findall(r"_target_:\s*([\w.]+)", file.read_text(encoding="utf-8")) for file in CONF.rglob("*.yaml"))
    return frozenset(target for targets in found for target in targets)


def allowed(target: str, plugins: Sequence[str] = ()) -> str | None:
    """Why `target` may not be called, or None where it may."""
    if target in shipped():
        return None
    owner = next((p for p in (*PACKAGES, *plugins) if target.startswith(f"{p}.")), None)
    if owner is None:
        return _outside(target)
    for part in accumulate(target.split("."), "{}.{}".format):
        home = found.module if (found := locate(part)) else owner
        if home != owner and not home.startswith(f"{owner}."):
            return f"{target} is not defined in {owner}: it comes from {home}"
    if found is None or isinstance(found.node, ast.Pass):
        module, _, name = target.rpartition(".")
        return f"{target} does not exist{did_you_mean(name, names(module))}"
    if not found.name:
        return f"{target} is a module; name a class or a function in it"
    if any(found.module == m or found.module.startswith(f"{m}.") for m in MACHINERY):
        return f"{target} is part of the machinery around runs, not of a run"
    return None


def _outside(target: str) -> str:
    top = target.split(".")[0]
    if top in sys.stdlib_module_names or not target.replace(".", "").isidentifier():
        return f"{target} may not be called from a configuration"
    if top in NOT_PLUGINS:
        return f"{target} is not among the targets of conf/; wrap it in a class of your own package"
    return f"{target} is outside of trainkit; if {top} is your package, add plugins=[{top}]"


def check_plugins(plugins: Any) -> None:
    """`plugins` is a list of the user's own packages."""
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise UserError(f"plugins wants a list of packages: plugins=[mine], not {plugins!r}")
    for name in plugins:
        top = name.split(".")[0]
        if top in sys.stdlib_module_names or top in NOT_PLUGINS:
            raise UserError(
                f"plugins=[{name}]: {name} cannot be a plugin, it would open far more than a configuration needs",
                "name a package of your own that defines the class",
            )


def check_targets(job: Composition, plugins: Sequence[str]) -> None:
    """Every `_target_`, however deep and however it came about, may be called."""
    written_out = [(key, twin) for key, _, twin in walk(job.raw, job.resolved)]
    computed = [(key, value) for key, value, _ in walk(job.resolved)]
    for key, target in written_out + computed:
        if key.rpartition(".")[2] == "_target_":
            reason = allowed(target, plugins) if isinstance(target, str) else f"{shown(target)} is no dotted name"
            if reason:
                raise UserError(f"{key}{job.where(key)}: {reason}")


def check_literal(job: Composition) -> None:
    """An earlier run's configuration holds values and references to its own nodes, nothing that is computed.

    What is computed (by the time of day, say) could be one thing while it is checked and another when it is built.
    """
    for key, value, _ in walk(job.raw):
        is_reference = re.fullmatch(r"\$\{[A-Za-z_][\w.]*\}", str(value)) and not key.endswith("_target_")
        if isinstance(value, str) and "${" in value and not is_reference:
            raise UserError(f"{key} of the earlier run is computed, {value!r}: a run saves plain values only")


def parameter(raw: dict[str, Any], key: str) -> Parameter | None:
    """The parameter that `key` is handed to, if its node has a target that takes one by that name."""
    parent, _, name = key.rpartition(".")
    takes = _signature_at(parent, select(raw, parent))
    found = takes.parameters.get(name) if takes else None
    return found if found and found.annotation else None


def _signature_at(key: str, node: Any) -> Signature | None:
    """The keywords that are legal at a node: its target's, and those of the group's host."""
    target = node.get("_target_") if isinstance(node, dict) else None
    takes = signature(target) if isinstance(target, str) else None
    host = _host(key)
    if takes is None or host is None:
        return takes
    return Signature({**host, **takes.parameters}, takes.open)


def split_off(key: str) -> set[str]:
    """The keywords of the node `key` that its target never sees, because its host takes them."""
    return set(_host(key) or ())


def _host(key: str) -> dict[str, Parameter] | None:
    # Also task.optimizer, the same node in a resolved configuration.
    hosts = [host for node, host in HOSTS.items() if key == node or key.endswith(f".{node}")]
    host = signature(hosts[0]) if hosts else None
    return host and {name: replace(p, required=False) for name, p in host.parameters.items() if p.keyword_only}


def check_parameters(job: Composition) -> None:
    """Each key beside a `_target_` is a parameter of it, of the right type, and none that it needs is absent."""
    for key, node, resolved in walk(job.raw, job.resolved):
        takes = _signature_at(key, node)
        if takes is None:
            continue
        given = {name: value for name, value in resolved.items() if name not in HYDRA_KEYS}
        for name, value in given.items():
            _check_keyword(f"{key}.{name}", value, node, takes, job)
        absent = [p.name for p in takes.parameters.values() if p.required and p.name not in given]
        if absent and not node.get("_partial_") and not node.get("_args_"):
            raise UserError(
                f"{key} lacks {absent[0]!r}, which {node['_target_']} needs{job.where(f'{key}._target_')}",
                f"give it in YAML or as +{key}.{absent[0]}=VALUE",
            )


def _check_keyword(key: str, value: Any, node: dict[str, Any], takes: Signature, job: Composition) -> None:
    name = key.rpartition(".")[2]
    raw_value = node[name]
    if name not in takes.parameters:
        if not takes.open:
            raise UserError(
                f"{key}{job.where(key)}: {node['_target_']} takes no '{name}'{did_you_mean(name, takes.parameters)}",
                listed("it takes", takes.parameters),
            )
        return
    wanted = takes.parameters[name]
    read = job.earlier or (isinstance(raw_value, str) and "${" in raw_value)
    if value is None and (read or (node.get("_partial_") and wanted.required)):
        return  # filled later: after reading the data, or by the caller of the factory
    if fits(wanted, value) is False:
        raise UserError(wrong_type(key, job.where(key), wanted, value))


def wrong_type(key: str, where: str, wanted: Parameter, value: Any) -> str:
    """The sentence about a value that does not fit its parameter's annotation."""
    return f"{key}={shown(value)}{where}: {wanted.name} wants {written(wanted)}{_advice(wanted, value)}"


def _advice(wanted: Parameter, value: Any) -> str:
    """How a value of the wrong type might be written."""
    if isinstance(value, str):
        return f", not a text{did_you_mean(value, literals(wanted))}"
    if isinstance(value, float) and value.is_integer() and fits(wanted, int(value)):
        return f": write {int(value)}"
    if not isinstance(value, (list, dict)) and fits(wanted, str(value)):
        return f": quote it, \\'{shown(value)}\\'"
    return f": write it as a list, [{shown(value)}]" if fits(wanted, [value]) else ""
