"""Everything around one run: checks before it, its directory, its processes, its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from trainkit.launch.job import Result


def run(overrides: list[str]) -> Result:
    """Does what `python run.py <overrides>` does, in this process; returns the run's directory and final metrics.

    Raises trainkit.launch.explain.UserError for a mistake in the overrides or the data, and whatever training raises.
    """
    from trainkit.launch.preflight import check
    from trainkit.launch.resume import recorded

    plan = recorded(check(list(overrides)))
    if plan.multirun or plan.passthrough:
        from trainkit.launch.explain import UserError

        raise UserError("trainkit.run takes the overrides of one run; a sweep is `python run.py -m …`")
    from trainkit.launch.job import execute

    return execute(plan.configs[0], plan.overrides[0], plan.typed)


def load(directory: str | Path, *, checkpoint: str = "last", plugins: Sequence[str] = ()) -> nn.Module:
    """The trained model of a run's directory, or of one that mode=convert or mode=export wrote, in eval mode.

    checkpoint: last or best. plugins: packages outside trainkit that its configuration may call. Raises
    trainkit.launch.explain.UserError where there is no such run, or its configuration calls anything else.
    """
    from trainkit.launch import rundir
    from trainkit.launch.explain import UserError
    from trainkit.launch.job import make, mistakes
    from trainkit.launch.preflight import check_config
    from trainkit.launch.runconfig import load_config
    from trainkit.launch.weights import from_run

    directory = Path(directory).expanduser()
    if not rundir.is_run(directory):
        raise UserError(f"{str(directory)!r} is no run directory: it lacks result.json or config.yaml")
    cfg = load_config(directory / "config.yaml")
    check_config(cfg, plugins=plugins)
    with mistakes():
        task = make(cfg, "task")
        from_run(task, directory, checkpoint=checkpoint, form=cfg.get("to"))
    return task.model.eval()
