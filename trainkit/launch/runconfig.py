"""A run's configuration on disk, for people and for continuing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from trainkit.launch.check.calls import check_calls
from trainkit.launch.disk import writing
from trainkit.launch.explain import UserError
from trainkit.launch.rundir import write_text

HOLDS = {"convert": "a converted", "export": "an exported"}  # by the mode that wrote it
FACTS = (
    "vocab",
    "classes",
    "image",
    "bytes_per_token",
    "unigram_entropy",
    "fingerprint",
)  # what only reading the data tells

# What a run that is continued keeps. An optimizer's settings come back with its state, whatever the configuration says.
SAME = ("model", "norm", "norm_layer", "data", "seed", "to", "optimizer")
UNSEEN = (".cache_dir", "data.workers")  # settings of data on which no number depends
PLACES = ("data.path", "data.val_path")  # nor on these, of data that are known by their fingerprint


def save_config(cfg: DictConfig, path: Path) -> None:
    """The resolved configuration as YAML. A node used in several places is written once, and named where it is used
    again (a YAML anchor), so that load_config can tie them together again."""

    class Anchored(yaml.SafeDumper):
        def generate_anchor(self, node: yaml.Node) -> str:
            return names[id(node)] if id(node) in names else super().generate_anchor(node)

        def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
            node = super().represent_mapping(tag, mapping, flow_style)
            if id(mapping) in keys:
                names[id(node)] = keys[id(mapping)]
            return node

    resolved = _resolved(cfg)
    keys = {id(value): key for key, value in resolved.items() if isinstance(value, dict)}
    names: dict[int, str] = {}
    with writing(path, path.parent):
        write_text(path, yaml.dump(resolved, Dumper=Anchored, sort_keys=False, allow_unicode=True))


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    """Plain containers in which a top-level node that others refer to as `${node}` is one and the same object."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    done: dict[str, Any] = {}

    def node(key: str) -> Any:
        if key not in done:
            done[key] = walk(plain[key], key)
        return done[key]

    def walk(value: Any, at: str) -> Any:
        if isinstance(value, dict):
            return {k: walk(v, f"{at}.{k}") for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v, f"{at}.{i}") for i, v in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            target = value[2:-1]
            if target in plain and isinstance(plain[target], dict):
                return node(target)
            found = OmegaConf.select(cfg, at)
            return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        return value

    return {str(key): node(str(key)) for key in plain}


def load_config(path: Path) -> DictConfig:
    """The configuration that save_config wrote; nodes that were one node then are interpolations of it again."""
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{str(path)!r} holds no configuration, which is a mapping")
    top = {id(value): key for key, value in plain.items() if isinstance(value, dict)}

    def tie(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: f"${{{top[id(v)]}}}" if id(v) in top else tie(v) for k, v in value.items()}
        return [tie(v) for v in value] if isinstance(value, list) else value

    return OmegaConf.create({key: tie(value) for key, value in plain.items()})


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as people read it: resolved, without _target_ and its like, each node in one place."""
    resolved = _resolved(cfg)
    top = {id(value) for value in resolved.values() if isinstance(value, dict)}

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if not str(k).startswith("_") and id(v) not in top}
        return value

    return {key: clean(value) for key, value in resolved.items()}


def continues(cfg: DictConfig, directory: Path) -> None:
    """Takes over what the run learnt from its data, and refuses to continue it as another model or task."""
    before = load_config(directory / "config.yaml")
    check_calls(before, plugins=list(cfg.plugins))
    if before.get("mode", "train") != "train":
        raise UserError(
            f"resume continues training; {str(directory)!r} holds {HOLDS[before.mode]} model without a training state",
            f"start another run from its weights: init_from={directory}" + (f" to={before.to}" if before.to else ""),
        )
    for name in FACTS:
        if name in cfg.data and before.data.get(name) is not None:
            OmegaConf.update(cfg, f"data.{name}", before.data[name])
    may_change = (*UNSEEN, *(PLACES if before.data.get("fingerprint") else ()))
    for group in SAME:
        now, then = (OmegaConf.select(c, group) for c in (cfg, before))
        pairs = [pair for pair in _differences(now, then, group) if not pair[0].endswith(may_change)]
        if pairs:
            key, new, old = pairs[0]
            raise UserError(
                f"resume continues a run with {key}={old}, and {key}={new} was asked for",
                f"leave that word out, or start another run from these weights: init_from={directory}",
            )


def _differences(now: Any, then: Any, at: str) -> list[tuple[str, Any, Any]]:
    if OmegaConf.is_dict(now) and OmegaConf.is_dict(then):
        keys = dict.fromkeys([*now, *then])
        return [d for k in keys for d in _differences(now.get(k), then.get(k), f"{at}.{k}")]
    now, then = (OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for v in (now, then))
    return [] if now == then else [(at, now, then)]
