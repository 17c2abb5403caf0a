"""`-m`: every job in a process of its own, one after another, and a table at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from trainkit.launch import rundir
from trainkit.launch.console import log, show, to_terminal
from trainkit.launch.preflight import Plan

RUN = Path(__file__).resolve().parents[2] / "run.py"
# What a launcher or a run leaves in the environment, and what would make the next job part of the last one.
FOREIGN = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
FOREIGN += ("MASTER_PORT", "PL_GLOBAL_SEED", "WANDB_RUN_ID", "WANDB_SERVICE", "WANDB_RESUME", rundir.SHARED_DIR)


def clean_environment() -> dict[str, str]:
    """This process's environment without the traces of another run."""
    return {k: v for k, v in os.environ.items() if k not in FOREIGN and not k.startswith("TORCHELASTIC_")}


def sweep(plan: Plan) -> int:
    """Runs the jobs of a checked plan; returns 0 when all of them finished, else 1.

    Each job is a child process with a clean environment and the directory <sweep>/<number>; sweep.json is kept up to
    date after each, so that an interrupted sweep still says what it did.
    """
    to_terminal()
    first = plan.configs[0]
    directory = rundir.new_dir(first.paths.log_dir, first.name or first.choices.model)
    rundir.make(directory)
    varied = _varied(plan.overrides)
    jobs: list[dict[str, Any]] = [{"overrides": words, "status": "waiting"} for words in plan.overrides]
    record = {"started": time.time(), "argv": sys.argv[1:], "jobs": jobs}
    for number, job in enumerate(jobs):
        label = " ".join(w for w in job["overrides"] if w.split("=")[0] in varied) or "(one job)"
        log.info("\n[%d/%d] %s", number + 1, len(jobs), label)
        target = directory / str(number)
        words = [w for w in job["overrides"] if not w.startswith("paths.run_dir=")]
        job |= {"status": "running", "dir": str(target)}
        rundir.write_json(directory / "sweep.json", record)
        command = [sys.executable, str(RUN), *words, f"paths.run_dir={target}"]
        code = subprocess.run(command, env=clean_environment(), check=False).returncode
        result = rundir.read_json(target / "result.json")
        job |= {
            "status": "finished" if code == 0 else "failed",
            "exit_code": code,
            "metrics": result.get("metrics", {}),
        }
        rundir.write_json(directory / "sweep.json", record)
    rundir.write_json(directory / "sweep.json", record | {"ended": time.time()})
    show(table(directory, jobs, varied))
    return 0 if all(job["status"] == "finished" for job in jobs) else 1


def _varied(overrides: list[list[str]]) -> list[str]:
    """The keys whose value differs between jobs, in the order of the command line."""
    values: dict[str, set[str]] = {}
    for words in overrides:
        for word in words:
            key, _, value = word.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1]


def table(directory: Path, jobs: list[dict[str, Any]], varied: list[str]) -> Any:
    """The jobs side by side: what varied, how each ended, its final losses."""
    from rich.table import Table

    columns = [name for name in ("train/loss", "val/loss", "test/loss") if any(name in j["metrics"] for j in jobs)]
    made = Table(*varied, "status", *columns, title=f"sweep {directory}", title_justify="left")
    for job in jobs:
        words = dict(word.partition("=")[::2] for word in job["overrides"])
        losses = [f"{job['metrics'][c]:.4f}" if c in job["metrics"] else "" for c in columns]
        made.add_row(*(words.get(key, "") for key in varied), job["status"], *losses)
    return made
