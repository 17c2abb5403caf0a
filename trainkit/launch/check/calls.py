"""What a configuration would call, asked before anything of it is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainkit.launch.check.composition import Composition
from trainkit.launch.check.targets import check_literal, check_plugins, check_targets
from trainkit.launch.compose import register_resolvers

if TYPE_CHECKING:
    from omegaconf import DictConfig


def check_calls(cfg: DictConfig, *, plugins: Sequence[str] = ()) -> Composition:
    """The part of check_config that asks what the configuration would call, for a run whose weights alone are used.

    Nothing of it is built then; but whoever put such a name there did not mean well, and the weights are theirs too.
    """
    register_resolvers()
    check_plugins(list(plugins))
    job = Composition(cfg, earlier=True)
    check_literal(job)
    check_targets(job, plugins)
    return job
