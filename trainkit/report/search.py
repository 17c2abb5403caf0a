"""What a search found: the best words, how the best value came down, and which keys mattered.

Written at the end of `python run.py mode=search …`: search.md, .csv and .png.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainkit.launch.rundir import write_text
from trainkit.launch.summary import Job, markdown_table
from trainkit.report.canvas import RED, Canvas, whole_ticks, write_csv

VALUE, BEST = "#4c78a8", "#d9541e"
SHOWN = 10  # best jobs in the table
IMPORTANCE = """\
Shares of what separates the better jobs from all (PED-ANOVA, Watanabe et al. 2023, arXiv:2304.10255), as this search
saw it; with few jobs they say little."""


def write(
    directory: Path, jobs: Sequence[Job], search: Mapping[str, Any], importances: Mapping[str, float]
) -> list[Any]:
    """Writes the files below a search's directory; returns what the terminal shows."""
    metric, sign = search["metric"], 1 if search["direction"] == "minimize" else -1
    values = [_value(job, metric) for job in jobs]
    so_far = best_so_far(values, sign)
    ranked = sorted((n for n, value in enumerate(values) if value is not None), key=lambda n: (sign * values[n], n))  # type: ignore[operator]
    keys = list(jobs[0]["params"]) if jobs else []
    rows = [[n, job["status"], *_of_space(job, keys), values[n], so_far[n]] for n, job in enumerate(jobs)]
    write_csv(directory / "search.csv", ["job", "status", *keys, metric, "best so far"], rows)
    text = [f"# Search {directory.name}", ""]
    shown: list[Any] = []
    if ranked:
        best = ranked[0]
        line = shlex.join(["python", "run.py", *jobs[best]["overrides"]])
        text += [f"Best of {len(jobs)} jobs: job {best}, {metric} {values[best]:.6g}.", "", "```", line, "```", ""]
        shown += [f"best: job {best}, {metric} {values[best]:.6g}", f"  {line}"]
        table = [[str(n), *_of_space(jobs[n], keys), f"{values[n]:.4f}"] for n in ranked[:SHOWN]]
        text += [*markdown_table(["job", *keys, metric], table, left=1 + len(keys)), ""]
    else:
        text += [f"No job has finished with a {metric} that is a number.", ""]
    lost = [(n, job) for n, job in enumerate(jobs) if job["status"] in ("failed", "diverged")]
    if lost:
        text += [
            "## Without a value",
            "",
            *(f"- job {n}, {job['status']}: {job.get('reason', '')}" for n, job in lost),
            "",
        ]
    if importances:
        rows = [[key, f"{share:.2f}"] for key, share in sorted(importances.items(), key=lambda item: -item[1])]
        text += ["## Importance", "", *markdown_table(["key", "share"], rows, left=1), "", IMPORTANCE, ""]
        shown.append("importance: " + ", ".join(f"{key} {share}" for key, share in rows))
    if ranked:
        picture = draw(directory / "search.png", values, so_far, search)
        text += ["## History", "", f"![value by job]({picture.name})", ""]
        shown.append(f"figure {picture}")
    write_text(directory / "search.md", "\n".join(text))
    return shown


def best_so_far(values: Sequence[float | None], sign: int) -> list[float | None]:
    """The best of the values up to each job, by number; sign: 1 where less is better, -1 where more is."""
    found: list[float | None] = []
    best: float | None = None
    for value in values:
        if value is not None and (best is None or sign * value < sign * best):
            best = value
        found.append(best)
    return found


def draw(
    picture: Path, values: Sequence[float | None], so_far: Sequence[float | None], search: Mapping[str, Any]
) -> Path:
    """The value of each job and the best so far; crosses at the edge for jobs without a value."""
    with Canvas(1, width=9, height=5.6, heading="Search", title=_subtitle(values, search)) as canvas:
        axes = canvas.axes[0]
        there = [(n, value) for n, value in enumerate(values) if value is not None]
        axes.plot(*zip(*there, strict=True), "o", color=VALUE, ms=8, label="a job")
        best = [(n, value) for n, value in enumerate(so_far) if value is not None]
        axes.step(*zip(*best, strict=True), where="post", color=BEST, lw=2.4, label="best so far")
        lost = [n for n, value in enumerate(values) if value is None]
        if lost:
            edge = axes.get_xaxis_transform()
            axes.plot(
                lost,
                [0.98] * len(lost),
                "x",
                color=RED,
                ms=11,
                mew=2.4,
                transform=edge,
                clip_on=False,
                label="without a value",
            )
        axes.set(xlabel="job", ylabel=search["metric"])
        axes.grid(axis="y")
        axes.set_xlim(-0.5, max(len(values) - 0.5, 0.5))
        whole_ticks(axes.xaxis)
        handles, names = axes.get_legend_handles_labels()
        canvas.figure.legend(handles, names, loc="outside lower center", ncols=3, handlelength=1.6)
        return canvas.save(picture)


def _subtitle(values: Sequence[float | None], search: Mapping[str, Any]) -> str:
    finished = sum(value is not None for value in values)
    return f"{search['metric']}, to {search['direction']} · {finished} of {len(values)} jobs · {search['sampler']}"


def _value(job: Job, metric: str) -> float | None:
    value = job.get("metrics", {}).get(metric) if job["status"] == "finished" else None
    return value if value is not None and math.isfinite(value) else None


def _of_space(job: Job, keys: Sequence[str]) -> list[str]:
    words = dict(word.partition("=")[::2] for word in job["overrides"])
    return [words.get(key, "") for key in keys]
