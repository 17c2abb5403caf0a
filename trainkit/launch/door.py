"""The door of run.py: what is answered at once, and the checked plan of what is to be run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from trainkit.launch.check import words
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import Plan, check
from trainkit.launch.resume import recorded


def enter(argv: Sequence[str]) -> Plan:
    """The door of run.py: answers --help and --cfg job itself; a mistake is printed and ends with exit code 2.

    The plan of a run or a sweep that is to be continued has the words of that in it.
    """
    try:
        line = words.read(list(argv))
        if "help" in line.flags:
            from trainkit.launch.menu import menu

            _answer(menu(bold=sys.stdout.isatty()))
        plan = recorded(check(argv))
        if line.flags.get("cfg") == "job":
            _answer(_job_text(plan, line))
        return plan
    except UserError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(error, file=sys.stderr)
        sys.exit(2)


def _answer(text: str) -> None:
    """Prints and ends. A reader that stops early (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _job_text(plan: Plan, line: words.CommandLine) -> str:
    """What --cfg job shows: the configuration as YAML, or the part of it that --package names."""
    from omegaconf import OmegaConf, open_dict

    if len(plan.configs) > 1:
        raise UserError("--cfg job shows one job: leave out -m and the sweep")
    cfg: Any = plan.configs[0]
    with open_dict(cfg):
        del cfg["choices"]
    package = line.flags.get("package")
    if package:
        cfg = OmegaConf.select(cfg, str(package))
        if not OmegaConf.is_config(cfg):
            raise UserError(f"--package {package}: there is no such node in the configuration")
    return OmegaConf.to_yaml(cfg, resolve="resolve" in line.flags).rstrip()
