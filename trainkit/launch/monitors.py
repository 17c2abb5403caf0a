"""What callbacks watch is compared with what the task reports, before training instead of after it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from trainkit.launch.explain import UserError, did_you_mean, listed
from trainkit.task.base import Task


def check_monitors(callbacks: Mapping[str, Any], task: Task) -> None:
    """Raises UserError where a callback watches a validation metric that the task does not report.

    Which it reports is asked for before anything was evaluated, so the values mean nothing; a task that cannot answer
    then is asked by the callback itself, after the first validation.
    """
    watched = {name: getattr(callback, "monitor", None) for name, callback in callbacks.items()}
    watched = {name: metric for name, metric in watched.items() if str(metric).startswith("val/")}
    if not watched:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = [f"val/{name}" for name in task.results("val")]
    except Exception:  # a task of the user's own may need data to answer
        return
    for name, metric in watched.items():
        if metric not in known:
            raise UserError(
                f"callbacks.{name}.monitor={metric} is not validated{did_you_mean(str(metric), known)}",
                listed("there are", known),
            )
