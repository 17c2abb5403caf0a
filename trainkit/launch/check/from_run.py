"""`schedule.from_run=`: the earlier run that a schedule is made from, looked up before anything is built."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.launch import rundir
from trainkit.launch.check.composition import Composition
from trainkit.launch.check.words import quoted
from trainkit.launch.explain import UserError
from trainkit.schedule.refined import norm_for, recorded

if TYPE_CHECKING:
    from omegaconf import DictConfig

KEY = "schedule.from_run"


def check_from_run(job: Composition) -> None:
    """The run is there, has finished and has the norms; its directory takes the place of `last` or a relative path."""
    from omegaconf import OmegaConf

    node = job.resolved.get("schedule")
    if not isinstance(node, dict) or "from_run" not in node:
        return
    if not isinstance(node["from_run"], str):
        raise UserError(f"{KEY} must name a finished run: {KEY}=DIR, or {KEY}=last for the newest")
    directory = _find(node["from_run"], job.resolved).resolve()
    result = rundir.read_json(directory / "result.json")
    if result.get("status") != "finished":
        raise UserError(
            f"{KEY}={node['from_run']}: {str(directory)!r} did not reach its end (status {result.get('status')})",
            f"name a finished run, or finish that one: resume={directory}",
        )
    if node["_target_"] == "trainkit.schedule.refined.refined":
        _check_norms(directory, node)
    OmegaConf.update(job.cfg, KEY, str(directory))


def settled(words: list[str], cfg: DictConfig) -> list[str]:
    """The words of a job with the directory that was found, so that resuming it does not find another run by `last`."""
    directory = (cfg.get("schedule") or {}).get("from_run")
    if not isinstance(directory, str) or directory == "???":
        return words
    return [word for word in words if word.partition("=")[0].lstrip("+") != KEY] + [f"{KEY}={quoted(directory)}"]


def _find(given: str, cfg: dict[str, Any]) -> Path:
    shared = os.environ.get(rundir.SHARED_DIR)
    if given == "last" and rundir.rank() > 0 and shared:  # the newest run is by now the one that this rank belongs to
        from trainkit.launch.runconfig import load_config

        given = load_config(Path(shared) / "config.yaml").schedule.from_run
    return rundir.find(given, cfg["paths"]["log_dir"], cfg["name"], key=KEY)


def _check_norms(directory: Path, node: dict[str, Any]) -> None:
    try:
        norm = node["norm"] if node["norm"] != "auto" else norm_for(node["optimizer"])
        log = directory / "metrics.jsonl"
        _read(directory, norm, log.stat().st_mtime_ns if log.is_file() else 0)
    except ValueError as error:
        raise UserError(*str(error).splitlines()) from error


@lru_cache
def _read(directory: Path, norm: Any, changed: int) -> None:
    """Reads the norms once for all jobs of a sweep."""
    recorded(directory, norm)
