"""mode=plan: what a run would take (memory, computation, communication, days), told without running it."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from trainkit.launch import rundir
from trainkit.launch.console import log, show
from trainkit.launch.job import Result
from trainkit.launch.mode.plan_screen import opening, sizes, totals
from trainkit.launch.mode.planner import prepare, strategy
from trainkit.launch.mode.remedies import remedies


def plan(cfg: DictConfig, overrides: list[str]) -> Result:
    """Prints the plan; creates nothing, but for paths.run_dir/plan.json where that folder is given.

    Raises UserError for settings that no run could have, and for images whose size only their data tell.
    """
    planner = prepare(cfg)
    needed, room = planner.memory, planner.device.bytes
    advice = remedies(planner, overrides) if needed.peak > room else []
    record = totals(planner)
    log.info("%s", opening(planner))
    if strategy(cfg.trainer) == "fsdp" and not planner.shardable:
        log.info("but refused: trainer=fsdp shards neither task streams nor what this optimizer needs whole")
    show(sizes(planner))
    for line in advice:
        log.info("%s", line.text(room))
    if cfg.paths.run_dir:
        directory = rundir.given(cfg.paths.run_dir)
        rundir.make(directory)
        rundir.write_json(directory / "plan.json", record | {"remedies": [vars(line) for line in advice]})
        log.info("written to %s", directory / "plan.json")
    metrics = {f"plan/{name}": float(value) for name, value in record.items() if isinstance(value, (int, float))}
    return Result(Path(cfg.paths.run_dir or "."), metrics, "finished")
