"""Everything around one run: checks before it, its directory, its processes, its result."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

    return execute(plan.configs[0], plan.overrides[0])
