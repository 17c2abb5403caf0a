"""`resume=` without repeating yourself: the words that a run was started with are part of continuing it."""

from __future__ import annotations

from trainkit.launch import rundir
from trainkit.launch.preflight import Plan, check

# `plugins` and folders that may set it count only when they are typed: a run directory from elsewhere must not widen
# what may be executed.
TYPED_ONLY = ("plugins", "hydra.searchpath", "resume", "mode", "paths.run_dir")


def recorded(plan: Plan) -> Plan:
    """A plan that continues a run, with the words of that run before those of the command line, which win."""
    if plan.multirun or plan.passthrough or plan.configs[0].mode != "train" or not plan.configs[0].resume:
        return plan
    cfg, words = plan.configs[0], plan.overrides[0]
    before = rundir.read_json(rundir.find(cfg.resume, cfg.paths.log_dir, cfg.name) / "result.json").get("overrides", [])
    typed = {key(word) for word in words}
    return check([w for w in before if key(w) not in typed and key(w) not in TYPED_ONLY] + words)


def key(word: str) -> str:
    """The key that an override sets or deletes."""
    return word.partition("=")[0].lstrip("+~")
