"""Run directories as runs leave them, made up in milliseconds."""

import json
import math
import random
from itertools import product
from pathlib import Path

import numpy as np

from trainkit.report.metrics_file import line

BLOCKS = 4


def run(folder: Path, overrides: list[str], *, steps: int = 20, status: str = "finished", shift: float = 0.0, **result):
    """One run: `steps` logged steps of a falling loss, gradient norms of BLOCKS blocks and the learning rate."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(str(folder.name) + " ".join(overrides))
    rows = []
    for step in range(1, steps + 1):
        loss = 2 + shift + 3 / math.sqrt(step) + draw.gauss(0, 0.02)
        row = {"step": step, "train/loss": loss, "lr": 1e-3 * (1 - step / (steps + 1)), "tokens_per_second": 1e4 + step}
        for block in range(BLOCKS):
            row[f"grad_norm/blocks.{block}"] = (block + 1) ** (shift * 5) / step**0.1
            row[f"grad_norm/blocks.{block}.attn"] = draw.random()
            row[f"hidden_variance/blocks.{block}"] = block + draw.random()
        if step % max(1, steps // 10) == 0:
            row["val/loss"] = loss + 0.1
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(map(line, rows)))
    words = dict(word.partition("=")[::2] for word in overrides)
    config = [
        f"seed: {words.get('seed', 0)}",
        "choices:",
        f"  norm: {words.get('norm', 'pre')}",
        "trainer: {threads: 1}",
    ]
    (folder / "config.yaml").write_text("\n".join(config) + "\n")
    metrics = {"train/loss": rows[-1]["train/loss"], "val/loss": 2.0 + shift + int(words.get("seed", 0)) / 100}
    written = {"status": status, "overrides": overrides, "seconds": 61.0, "parameters": 1000, **result}
    written |= {"optimizer_state_bytes": 8004, "versions": {"python": "3.11", "torch": "2.13.0"}}
    written |= {"metrics": metrics} if status == "finished" else {}
    (folder / "result.json").write_text(json.dumps(written))
    return folder


def sweep(folder: Path, words: dict[str, list], *, steps: int = 20, **result) -> Path:
    """A finished sweep over the product of the words' values."""
    jobs = []
    for number, values in enumerate(product(*words.values())):
        overrides = [f"{key}={value}" for key, value in zip(words, values, strict=True)]
        shift = next(iter(words.values())).index(values[0]) / 20
        run(folder / str(number), overrides, steps=steps, shift=shift, **result)
        known = json.loads((folder / str(number) / "result.json").read_text())
        jobs.append({"overrides": overrides, "status": "finished", "seconds": 61.0, "metrics": known["metrics"]})
    (folder / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return folder


def stream(folder: Path, tasks: int = 3, first: float = 0.9) -> None:
    """Gives a run the accuracies of a stream of tasks."""
    lines = ["trained," + ",".join(f"task_{k}" for k in range(tasks))]
    for t in range(tasks):
        lines.append(",".join([str(t), *(str(first - 0.1 * (t - k)) if k <= t else "" for k in range(tasks))]))
    (folder / "accuracy_matrix.csv").write_text("\n".join(lines) + "\n")
    result = json.loads((folder / "result.json").read_text())
    result["metrics"]["continual/final_average_accuracy"] = float(np.mean([first - 0.1 * k for k in range(tasks)]))
    (folder / "result.json").write_text(json.dumps(result))
