"""`python -m trainkit.report wandb_sweep WORDS`: a sweep for W&B's agents, from the words of run.py.

WORDS are those of `python run.py -m`; each agent asks W&B for the next combination and starts run.py with it:
  python -m trainkit.report wandb_sweep norm=pre,peri optimizer.lr=1e-4,1e-3
  wandb sweep logs/wandb_sweeps/FILE.yaml && wandb agent ID
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

from trainkit.launch.check import words
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import OF_THE_SWEEP, Plan, check
from trainkit.launch.rundir import make, write_text

GOALS = {"min": "minimize", "max": "maximize"}


def main(argv: list[str]) -> int:
    """Writes the file below paths.log_dir and prints where; returns the exit code, 2 for the user's mistake."""
    try:
        line = words.read(argv)
        if "help" in line.flags:
            print(__doc__)
            return 0
        if set(line.flags) - {"multirun"}:
            raise UserError("a sweep for W&B is made of settings, key=value, and takes no flags")
        plan = check(["-m", *line.overrides])
        made = sweep(plan)
        folder = Path(plan.configs[0].paths.log_dir) / "wandb_sweeps"
        make(folder)
        name = re.sub(
            r"[^\w.=,-]+", "_", "_".join(f"{key}={len(v['values'])}" for key, v in made["parameters"].items())
        )
        path = folder / f"{name[:120]}.yaml"
        write_text(path, yaml.safe_dump(made, sort_keys=False))
        print(path)
        print(f"wandb sweep {path}")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def sweep(plan: Plan) -> dict[str, Any]:
    """The sweep as W&B reads it: what varies are its parameters, the other words stand in the command.

    The metric is that of the best checkpoint. Raises UserError for what W&B's agents cannot do.
    """
    cfg = plan.configs[0]
    for word in plan.words:
        if word.lstrip("+~").startswith((*OF_THE_SWEEP, "paths.run_dir")):
            raise UserError(f"{word} is about a sweep that run.py looks after, and here W&B does; leave it out")
    for one in plan.configs:
        if "wandb" not in str(one.choices.logger):
            raise UserError(f"logger={one.choices.logger}: W&B learns the results of a sweep by logger=wandb")
    monitor = (cfg.callbacks or {}).get("checkpoint") or {}
    if "monitor" not in monitor:
        raise UserError("a sweep has a metric, and callbacks.checkpoint, which says which, was left out")
    columns: dict[str, list[str]] = {}
    for job in plan.overrides:
        for word in job:
            key, _, value = word.partition("=")
            values = columns.setdefault(key, [])
            if value not in values:
                values.append(value)
    typed = {word.partition("=")[0]: word for word in plan.words}
    fixed = [word for key, word in typed.items() if len(columns.get(key, [])) < 2]
    varied = {key: [_number(value) for value in columns[key]] for key in typed if len(columns.get(key, [])) > 1}
    if not varied:
        raise UserError("nothing varies: give a key several values, as in norm=pre,peri")
    return {
        "program": "run.py",
        "method": "grid",
        "metric": {"name": str(monitor["monitor"]), "goal": GOALS[str(monitor.get("mode", "min"))]},
        "parameters": {key: {"values": values} for key, values in varied.items()},
        "command": ["${env}", "${interpreter}", "${program}", *fixed, "${args_no_hyphens}"],
    }


def _number(value: str) -> int | float | str:
    """A value as W&B draws it: numbers on an axis of numbers, everything else as it was typed."""
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
