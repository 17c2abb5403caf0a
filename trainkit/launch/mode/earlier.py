"""What the modes that work on an earlier run have in common: which run, and its configuration with today's words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from trainkit.launch import rundir
from trainkit.launch.compose import overlay
from trainkit.launch.preflight import check_config
from trainkit.launch.runconfig import load_config

OF_TODAY = ("sample", "export")  # nodes that say what is made of a run, and are no part of it


def earlier(cfg: DictConfig, overrides: Sequence[str]) -> tuple[Path, DictConfig]:
    """The run that `resume` names, and its own configuration with the words of the command line on top, checked.

    Raises UserError where there is no such run, or a word does not fit it.
    """
    directory = rundir.find(cfg.resume, cfg.paths.log_dir, cfg.name)
    words = [word for word in overrides if word.lstrip("+~").partition("=")[0].split(".")[0] not in OF_TODAY]
    own = overlay(load_config(directory / "config.yaml"), words)
    check_config(own, plugins=list(cfg.plugins))
    return directory, own
