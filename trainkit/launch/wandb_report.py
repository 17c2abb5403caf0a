"""A sweep's report in W&B: a run of the sweep's group that shows the page, with page and table as an artifact."""

from __future__ import annotations

import re
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def is_online(log_dir: Path, ids: Iterable[str]) -> bool:
    """Whether any of these runs went to W&B's server, told from what W&B leaves on disk: so nothing is imported."""
    return any(next((log_dir / "wandb").glob(f"run-*-{run_id}"), None) is not None for run_id in ids)


def publish(cfg: DictConfig, directory: Path, page: Path) -> None:
    """Uploads the report of the sweep in `directory`, again into the same W&B run where it is there already.

    cfg: of one of its jobs, whose project and entity count. What W&B cannot do is warned of.
    """
    import wandb

    from trainkit.launch.wandb import WandB

    options: dict[str, Any] = OmegaConf.to_container(cfg.logger, resolve=True)  # type: ignore[assignment]
    logger = WandB(
        run_dir=directory,
        log_dir=Path(cfg.paths.log_dir),
        run_id=blake2b(str(directory.absolute()).encode(), digest_size=8).hexdigest(),
        name=f"{directory.name}/report",
        config={},
        group=directory.name,
        job_type="report",
        resumed=True,
        **{key: value for key, value in options.items() if not key.startswith("_")},
    )
    named = re.sub(r"[^\w.-]", "_", directory.name, flags=re.ASCII)[:100]  # W&B takes no other names
    artifact = wandb.Artifact(f"report-{named}", type="report", description=f"what {directory} found")
    for path in (page, directory / "summary.md", directory / "summary.csv"):
        if path.is_file():
            artifact.add_file(str(path))
    logger.upload("report", {"report": wandb.Html(str(page), inject=False)}, artifact)
    logger.finish()
