"""Settings that a constructor will refuse are refused before it is imported, in the constructor's own words.

Many constructors begin with `if width % heads: raise ValueError(f"…")`. Such guards are read from source, like
signatures, and evaluated on the values of the configuration (evaluate.py).
"""

from __future__ import annotations

from typing import Any

from trainkit.launch.check.composition import Composition, walk
from trainkit.launch.check.definition import locate
from trainkit.launch.check.evaluate import UNKNOWN, Refused, call
from trainkit.launch.check.targets import HYDRA_KEYS, split_off
from trainkit.launch.explain import UserError


def check_guards(job: Composition) -> None:
    """No target refuses its settings, as far as that can be told before anything is built."""
    for key, node, resolved in walk(job.raw, job.resolved):
        target = node.get("_target_") if isinstance(node, dict) else None
        if not isinstance(target, str):
            continue
        given = {
            name: _known(value, optional=bool(node.get("_partial_")) or "${" in str(node[name]))
            for name, value in resolved.items()
            if name not in HYDRA_KEYS | split_off(key)
        }
        message = refusal(target, given)
        if message:
            named = f"{key.split('.')[0]}." in message
            if key.startswith("optimizer."):  # an optimizer within another knows itself by its group alone
                message = message.replace("optimizer.", f"{key}.", 1)
            raise UserError(message if named else f"{key}{job.where(f'{key}._target_')}: {message}")


def refusal(target: str, given: dict[str, Any]) -> str | None:
    """The message of the ValueError that calling `target` with these keywords certainly ends in, or None."""
    found = locate(target)
    try:
        if found is not None:
            call(found, [], given, depth=0)
    except Refused as refused:
        return str(refused)
    return None


def _known(value: Any, *, optional: bool) -> Any:
    """A configured value as its target gets it. A node becomes an object; null may be filled in later if `optional`."""
    if (value is None and optional) or any(key.rpartition(".")[2] == "_target_" for key, *_ in walk({"": value})):
        return UNKNOWN
    return value
