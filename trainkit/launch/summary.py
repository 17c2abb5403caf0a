"""What a sweep found: its jobs side by side, and jobs that differ in their seed alone as mean and interval."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainkit.launch import rundir

STAGES = ("train/", "val/", "test/", "continual/", "task_il/")
# What is shown on the terminal, the first four of these that the jobs have; all metrics are in summary.md.
SHOWN = ("continual/final_average_accuracy", "continual/forgetting_chaudhry", "val/accuracy", "val/loss")
SHOWN += ("test/accuracy", "test/loss", "train/loss")
SEED = "seed"

Job = dict[str, Any]  # an entry of sweep.json


def varied(overrides: Iterable[Sequence[str]]) -> list[str]:
    """The keys whose value differs between jobs, in the order of the command line."""
    values: dict[str, set[str]] = {}
    for words in overrides:
        for word in words:
            key, _, value = word.partition("=")
            values.setdefault(key, set()).add(value)
    return [key for key, seen in values.items() if len(seen) > 1]


def label(job: Job, keys: Sequence[str]) -> str:
    """What makes a job differ from the others, as its words."""
    return " ".join(word for word in job["overrides"] if word.partition("=")[0] in keys) or "(one job)"


def write(directory: Path, jobs: Sequence[Job]) -> None:
    """<sweep>/summary.csv, numbers for programs, and summary.md, the same for people."""
    rundir.write_text(directory / "summary.csv", _csv(jobs))
    rundir.write_text(directory / "summary.md", _markdown(directory, jobs))


def groups(jobs: Sequence[Job]) -> list[tuple[list[str], list[Job]]]:
    """(the values of what was varied besides the seed, the finished jobs with them); none where no seed was varied.

    A group of one job is left out: nothing is known of how far seeds spread.
    """
    keys = varied(job["overrides"] for job in jobs)
    if SEED not in keys:
        return []
    found: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        if job["status"] == "finished":
            found.setdefault(tuple(_values(job, [key for key in keys if key != SEED])), []).append(job)
    return [(list(values), members) for values, members in found.items() if len(members) > 1]


def differences(jobs: Sequence[Job], name: str) -> list[tuple[float, float, int] | None]:
    """For every group but the first: (mean, half width of its interval, pairs) of its metric minus the first group's.

    Paired by seed, as the runs of a seed share their data and draws; None where fewer than two seeds are common.
    """
    paired = [
        {_values(job, [SEED])[0]: job["metrics"][name] for job in members if name in job.get("metrics", {})}
        for _, members in groups(jobs)
    ]
    found: list[tuple[float, float, int] | None] = []
    for group in paired[1:]:
        apart = [value - paired[0][seed] for seed, value in group.items() if seed in paired[0]]
        found.append((*mean_and_interval(apart), len(apart)) if len(apart) > 1 else None)
    return found


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean m and the half width h of its 95 % confidence interval [m - h, m + h], h = t · s / sqrt(n).

    t: the 0.975 quantile of Student's distribution with n - 1 degrees of freedom; s: the sample's standard deviation.
    """
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) * (value - mean) for value in values) / (n - 1))
    return mean, student(n - 1) * deviation / math.sqrt(n)


def student(freedom: int, share: float = 0.95) -> float:
    """t such that a Student-distributed number with so many degrees of freedom lies in [-t, t] with probability share.

    By bisection of the closed form for whole degrees (Abramowitz & Stegun 26.7.3 and 26.7.4), in
    theta = atan(t / sqrt(freedom)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < share else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _inside(theta: float, freedom: int) -> float:
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for k in range(freedom // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    return 2 / math.pi * (theta + sine * total) if odd else sine * total


# --- the files -----------------------------------------------------------------------------------------------------


def _csv(jobs: Sequence[Job]) -> str:
    """A row per job, then a row per group: its number of seeds, the means, and the half widths of their intervals."""
    keys, metrics = varied(job["overrides"] for job in jobs), _metrics(jobs)
    grouped = groups(jobs)
    measured = ["parameters", "seconds", "optimizer_state_bytes"]
    intervals = [f"{name} ci95" for name in metrics] if grouped else []
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["job", "seeds", *keys, "status", *metrics, *intervals, *measured, "reason", "dir"])
    for number, job in enumerate(jobs):
        values = [job.get("metrics", {}).get(name, "") for name in metrics]
        table.writerow(
            [number, "", *_values(job, keys), job["status"], *values, *([""] * len(intervals))]
            + [job.get(name, "") for name in measured]
            + [job.get("reason", ""), job.get("dir", "")]
        )
    for values, members in grouped:
        columns = dict(zip([key for key in keys if key != SEED], values, strict=True))
        found = [_statistics(members, name) for name in metrics]
        same = [_common(members, "parameters"), _mean(members, "seconds"), _common(members, "optimizer_state_bytes")]
        table.writerow(
            ["", len(members), *(columns.get(key, "") for key in keys), "mean", *(mean for mean, _ in found)]
            + [width for _, width in found]
            + [*same, "", ""]
        )
    return text.getvalue()


def _markdown(directory: Path, jobs: Sequence[Job]) -> str:
    keys, metrics = varied(job["overrides"] for job in jobs), _metrics(jobs)
    head = ["job", *keys, "status", *metrics, "parameters", "time", "optimizer state"]
    rows = [
        [str(number), *_values(job, keys), job["status"], *(_number(job, name) for name in metrics), *_costs([job])]
        for number, job in enumerate(jobs)
    ]
    text = [f"# Sweep {directory.name}", "", *markdown_table(head, rows, left=len(keys) + 2)]
    failed = [(n, job) for n, job in enumerate(jobs) if job.get("reason") and job["status"] != "finished"]
    if failed:
        text += ["", "## What went wrong", ""]
        text += [f"- job {number} ({label(job, keys)}): {job['reason']}" for number, job in failed]
    grouped = groups(jobs)
    if grouped:
        others = [key for key in keys if key != SEED]
        rows = [
            [*values, str(len(members)), *(_spread(*_statistics(members, name)) for name in metrics), *_costs(members)]
            for values, members in grouped
        ]
        text += ["", "## Over seeds", "", "Mean ± half width of the 95 % confidence interval (Student's t).", ""]
        head = [*others, "seeds", *metrics, "parameters", "mean time", "optimizer state"]
        text += markdown_table(head, rows, left=len(others))
    if len(grouped) > 1:
        others = [key for key in keys if key != SEED]
        columns = [differences(jobs, name) for name in metrics]
        rows = [
            [*values, *("" if cell is None else f"{cell[0]:+.4f} ± {cell[1]:.2g} ({cell[2]})" for cell in cells)]
            for (values, _), *cells in zip(grouped[1:], *columns, strict=True)
        ]
        first = " ".join(grouped[0][0])
        text += ["", f"## Difference to {first}", ""]
        text += ["Paired by seed: mean ± half width of the 95 % confidence interval, and the number of pairs.", ""]
        text += markdown_table([*others, *metrics], rows, left=len(others))
    return "\n".join(text) + "\n"


def markdown_table(head: list[str], rows: list[list[str]], *, left: int) -> list[str]:
    """A Markdown table whose first `left` columns are texts and the others numbers."""
    rule = ["---" if column < left else "---:" for column in range(len(head))]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in [head, rule, *rows]]
    return ["| " + " | ".join(row) + " |" for row in cells]


def table(jobs: Sequence[Job]) -> Any:
    """The jobs on the terminal: what varied, how each ended and why, its final losses; then the means over seeds."""
    from rich.table import Table

    keys = varied(job["overrides"] for job in jobs)
    known = set(_metrics(jobs))
    metrics = [name for name in SHOWN if name in known][:4]
    reasons = ["reason"] if any(job.get("reason") and job["status"] != "finished" for job in jobs) else []
    made = Table("job", *keys, "status", *metrics, "time", *reasons)
    for number, job in enumerate(jobs):
        why = [_plain(job["reason"]) if job.get("reason") and job["status"] != "finished" else ""] if reasons else []
        values = [_number(job, name) for name in metrics]
        made.add_row(str(number), *map(_plain, _values(job, keys)), job["status"], *values, _time(job), *why)
    for values, members in groups(jobs):
        columns = dict(zip([key for key in keys if key != SEED], values, strict=True))
        made.add_row(
            "",
            *(_plain(columns.get(key, f"{len(members)} seeds")) for key in keys),
            "mean",
            *(_spread(*_statistics(members, name)) for name in metrics),
        )
    return made


# --- cells ---------------------------------------------------------------------------------------------------------


def _metrics(jobs: Sequence[Job]) -> list[str]:
    """The final metrics that any job has, stage by stage."""
    names = dict.fromkeys(name for job in jobs for name in job.get("metrics", {}))
    return [name for stage in STAGES for name in names if name.startswith(stage)]


def _values(job: Job, keys: Sequence[str]) -> list[str]:
    words = dict(word.partition("=")[::2] for word in job["overrides"])
    return [words.get(key, "") for key in keys]


def _statistics(jobs: Sequence[Job], name: str) -> tuple[float, float] | tuple[None, None]:
    values = [job["metrics"][name] for job in jobs if name in job.get("metrics", {})]
    return mean_and_interval(values) if len(values) == len(jobs) else (None, None)


def _common(jobs: Sequence[Job], name: str) -> int | None:
    """The number that all of them have."""
    values = {job.get(name) for job in jobs}
    return values.pop() if len(values) == 1 else None


def _mean(jobs: Sequence[Job], name: str) -> float | None:
    values = [job[name] for job in jobs if job.get(name)]
    return sum(values) / len(values) if values else None


def _costs(jobs: Sequence[Job]) -> list[str]:
    """Parameters, (mean) time and optimizer state of jobs that agree in them."""
    parameters, state = _common(jobs, "parameters"), _common(jobs, "optimizer_state_bytes")
    seconds = _mean(jobs, "seconds")
    per = f" ({state / parameters:.3g} B/parameter)" if parameters and state is not None else ""
    return [
        "" if parameters is None else f"{parameters:,}",
        "" if seconds is None else clock(seconds),
        "" if state is None else f"{size(state)}{per}",
    ]


def _number(job: Job, name: str) -> str:
    value = job.get("metrics", {}).get(name)
    return "" if value is None else f"{value:.4f}"


def _spread(mean: float | None, width: float | None) -> str:
    return "" if mean is None else f"{mean:.4f} ± {width:.2g}"


def _time(job: Job) -> str:
    return clock(job["seconds"]) if job.get("seconds") else ""


def _plain(text: str) -> str:
    """Text that rich does not take for markup."""
    return text.replace("[", r"\[")


def clock(seconds: float) -> str:
    """62 -> 1:02, 3723 -> 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(count: float) -> str:
    """1536 bytes -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"
