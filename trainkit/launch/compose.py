"""Words -> configuration: Hydra composes the chosen files, then each `key=value` is set on the result."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.launch.check.composition import Composition, exists, leaves
from trainkit.launch.check.values import SPACE, check_value
from trainkit.launch.check.words import parse
from trainkit.launch.explain import UserError, explained
from trainkit.launch.sources import CONF, Folders, folder_of

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


def compose(overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration of one job; `cfg.choices` holds {group: option} and Hydra's own node is left out.

    `hydra.searchpath=[FOLDER]` adds a folder of the user's own YAML files. Nothing is checked beyond what Hydra and
    OmegaConf check (preflight.check does that) and nothing is created on disk.
    """
    folders = search(overrides)
    words = parse(list(overrides), folders)
    values = [word for word in words if is_value(word, folders)]
    cfg = choose([word.input_line or "" for word in words if word not in values])
    for word in values:
        assign(cfg, word)
    return cfg


def search(overrides: Sequence[str]) -> Folders:
    """The folders that these overrides look for YAML files in. Raises UserError for one that does not exist."""
    given = [word for word in overrides if word.startswith("hydra.searchpath=")]
    if not given:
        return Folders()
    (entry,) = parse(given[-1:], Folders())
    entries = entry.value()
    if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
        raise UserError(f"{given[-1]}: wants a list of folders: hydra.searchpath=[FOLDER]")
    for name in entries:
        if not folder_of(name).is_dir():
            raise UserError(f"{given[-1]}: there is no folder {str(folder_of(name))!r} (seen from {Path.cwd()})")
    return Folders((CONF, *(folder_of(name) for name in entries)))


def is_value(word: Override, folders: Folders) -> bool:
    """Whether a word sets a key of the configuration; the others choose a file or speak to Hydra itself."""
    if word.is_hydra_override():
        return False
    return word.key_or_group not in folders.groups or isinstance(word.value(), dict)


def choose(words: list[str]) -> DictConfig:
    """The configuration that the chosen files make. `words`: overrides of groups and of Hydra itself.

    What a choice `prefers` elsewhere is set where such a key exists (norm=lns: model.init=plain), or only under one
    option of that group (model=gpt_124m: optimizer.lr under optimizer=adamw); typed words, set later, win.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf, open_dict

    register_resolvers()
    with warnings.catch_warnings(), explained(" ".join(words) or "conf/config.yaml"):
        warnings.filterwarnings("ignore", "The version_base parameter")  # Hydra 1.4: deprecated, and 1.3 asks for it
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra_compose("config", overrides=[*_without_hydras_own(words), *words], return_hydra_config=True)
    chosen = OmegaConf.to_container(cfg.hydra.runtime.choices)
    assert isinstance(chosen, dict)
    with open_dict(cfg):
        del cfg["hydra"]
        cfg.choices = {group: option for group, option in chosen.items() if not str(group).startswith("hydra/")}
    raw = Composition(cfg).raw
    for wish, settings in raw["prefers"].items():
        outer, _, option = wish.partition("=")
        # What is wished of an optimizer is wished of the one within it, too: optimizer/base.
        for group in (outer, *(inner for inner in raw["choices"] if inner.startswith(f"{outer}/"))):
            node = group.partition("@")[2] or group.replace("/", ".")  # optimizer/rest@optimizer.base.rest
            for key, value in leaves(settings, node):
                if exists(raw, key) and option in ("", chosen.get(group)):
                    OmegaConf.update(cfg, key, value)
    return cfg


def _without_hydras_own(words: list[str]) -> list[str]:
    """Words that leave Hydra's own files out, a fifth of the time, unless one of `words` speaks to them."""
    from hydra.conf import HydraConf

    if any(word.lstrip("+~").startswith(("hydra/", "hydra.")) and "hydra.searchpath" not in word for word in words):
        return []
    return [f"~hydra/{group}" for entry in HydraConf().defaults for group, option in entry.items() if option]


def assign(cfg: DictConfig, word: Override) -> None:
    """Sets, adds or deletes one key, with the meaning that Hydra gives to `=`, `+`, `++` and `~`.

    Done here and not by Hydra, so that each word can be compared with the default that it replaces. The space of a
    search is replaced as a whole, and its keys need no `+`.
    """
    from omegaconf import OmegaConf, open_dict

    key, value = word.key_or_group, word.value()
    with explained(f"cannot set {word.input_line!r}"):
        if word.is_delete():
            parent, _, name = key.rpartition(".")
            with open_dict(cfg):
                del (OmegaConf.select(cfg, parent) if parent else cfg)[name]
        else:
            add = word.is_add() or word.is_force_add() or key.startswith(f"{SPACE}.")
            OmegaConf.update(cfg, key, value, merge=key != SPACE, force_add=add)


def overlay(cfg: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """`cfg`, the configuration of an earlier run, with the words of a command line on top.

    A choice (`data=text`) replaces that group's node by the freshly composed one; a value is compared with the result
    and set on it. Raises UserError.
    """
    from omegaconf import open_dict

    folders = search(overrides)
    words = parse(list(overrides), folders)
    choices = [word for word in words if not is_value(word, folders)]
    fresh = Composition(choose([word.input_line or "" for word in choices])).raw
    with open_dict(cfg):
        for group in {word.key_or_group for word in choices} & set(fresh):
            cfg[group] = fresh[group]
            cfg.choices[group] = fresh["choices"][group]
    job = Composition(cfg, folders, words, earlier=True)
    for word in words:
        if word not in choices:
            check_value(word, job)
            assign(cfg, word)
    return cfg


def register_resolvers() -> None:
    """Makes `${user_cache:}` known to OmegaConf."""
    from omegaconf import OmegaConf

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "register_new_resolver")  # OmegaConf 2.4 renames it, 2.3 has this name only
        OmegaConf.register_new_resolver("user_cache", user_cache, replace=True)


def user_cache() -> str:
    """Where prepared data is kept: $TRAINKIT_CACHE, $XDG_CACHE_HOME/trainkit, or the platform's cache folder."""
    for variable, below in (("TRAINKIT_CACHE", ""), ("XDG_CACHE_HOME", "trainkit")):
        if os.environ.get(variable):
            return str(Path(os.environ[variable]).expanduser() / below)
    if sys.platform == "darwin":
        return str(Path.home() / "Library" / "Caches" / "trainkit")
    if sys.platform == "win32":
        return str(Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "trainkit" / "cache")
    return str(Path.home() / ".cache" / "trainkit")
