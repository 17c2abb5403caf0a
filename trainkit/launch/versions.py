"""What a run was made with: package versions, the machine and the state of the source."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "lightning", "hydra-core", "omegaconf", "wandb", "torchmetrics", "numpy")


def versions() -> dict[str, str]:
    """Versions by package, with python, platform and the git commit ("-dirty" where files had been changed)."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "git": commit()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def commit() -> str:
    """The commit of the source tree, or "unknown" outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
