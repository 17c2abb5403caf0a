"""Settings that a configuration leaves to the machine. What is chosen is kept with the run, which goes on with it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from omegaconf import DictConfig

from trainkit.launch import rundir
from trainkit.launch.process.machine import default_threads
from trainkit.launch.process.precision import choose_precision
from trainkit.launch.runconfig import load_config


def settle(cfg: DictConfig, previous: Path | None) -> list[str]:
    """Writes trainer.threads and trainer.precision into the configuration where it leaves them open, and sets this
    process's threads; gives a line about each choice that a reader may wonder at.

    Both decide over the bits of a sum, so a run keeps those that it began with, and a further rank has rank 0's.
    """
    trainer, lines = cfg.trainer, []
    began = previous or os.environ.get(rundir.SHARED_DIR)  # the second: this is a further rank of that run
    before = load_config(Path(began, "config.yaml")).trainer if began else {}
    if "threads" in trainer:
        if trainer.threads is None:
            trainer.threads = before.get("threads") or default_threads(trainer.get("devices", 1))
        torch.set_num_threads(max(1, trainer.threads))
    if trainer.get("precision") == "auto":
        chosen, why = before.get("precision", "auto"), "as when the run began"
        if chosen == "auto":
            chosen, why = choose_precision(trainer.get("accelerator", "auto"))
        trainer.precision = chosen
        lines.append(f"trainer.precision=auto: {chosen}, {why}")
    return lines
