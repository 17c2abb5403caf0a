"""trainkit: norm placements, norm layers, optimizers and continual-learning strategies as one-word plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainkit.launch import load as load
    from trainkit.launch import run as run


def __getattr__(name: str) -> object:
    # Lazy, so that importing a single plugin loads neither Hydra nor Lightning.
    if name in ("load", "run"):
        from trainkit import launch

        return getattr(launch, name)
    raise AttributeError(f"module 'trainkit' has no attribute {name!r}")
