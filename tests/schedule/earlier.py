"""Runs that have ended, as far as a schedule reads them."""

import json
from collections.abc import Sequence
from pathlib import Path

from trainkit.report.metrics_file import line


def earlier_run(
    folder: Path, l2: Sequence[float], l1: Sequence[float] | None = None, *, every: int = 1, status: str = "finished"
) -> Path:
    """The directory of a run that logged these norms at step 1 and every `every`-th step."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("mode: train\n")
    (folder / "result.json").write_text(json.dumps({"status": status, "started": 1.0}))
    rows = [{"step": 1, "val/loss": 3.0}]
    for step in [1, *range(every, len(l2) + 1, every)] if every > 1 else range(1, len(l2) + 1):
        norms = {"grad_norm/global": l2[step - 1]} | ({"grad_norm/global_l1": l1[step - 1]} if l1 else {})
        rows.append({"step": step, "train/loss": 2.0, "grad_norm/blocks.0.attn": 7.0, **norms})
    (folder / "metrics.jsonl").write_text("".join(map(line, rows)) + '{"step": 99, "grad_norm/glo')  # torn
    return folder
