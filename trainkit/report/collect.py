"""What runs on disk hold, read so that no damaged directory keeps the others from being shown.

Everything is read as data: config.yaml by YAML's safe loader, nothing is imported or executed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.launch.explain import shown
from trainkit.launch.rundir import read_json
from trainkit.report.accuracy_matrix import read as read_matrix
from trainkit.report.metrics_file import NON_FINITE, readable

OF_A_RUN = ("result.json", "config.yaml", "metrics.jsonl")
OF_A_SWEEP = ("sweep", "summary", "report", "lr_sensitivity", "search")  # whatever their suffix
OF_A_SWEEP += tuple(f"{name}.{kind}" for name in ("lr_sensitivity", "search") for kind in ("md", "csv", "png"))
# Words that say where and how a run was started, and not what it computes.
ELSEWHERE = ("resume", "mode", "logger", "name", "trainer.threads")
ELSEWHERE_BELOW = ("paths.", "sweep.", "hydra.", "hydra/", "logger.")
DEEPEST, MOST_KEYS = 20, 5000  # of a configuration: YAML's anchors can make it refer to itself
EXACT = 2**53  # larger steps are no longer whole numbers in the page


@dataclass(frozen=True)
class Series:
    """One metric of one run: ascending steps and their values, NaN and infinite where they were logged so."""

    steps: np.ndarray
    values: np.ndarray


@dataclass
class Run:
    """A run as far as its directory tells. status: finished, failed, diverged, interrupted, running, waiting, unknown.

    words: what was asked for, key by key, filled with the configuration's value where another run asked and this one
    did not; config: flat, key by key; metrics: the final ones; accuracy: the accuracy matrix of a stream of tasks;
    remarks: what is damaged or missing, a sentence each.
    """

    name: str
    dir: Path
    overrides: list[str] = field(default_factory=list)
    status: str = "unknown"
    reason: str = ""
    seconds: float | None = None
    result: dict[str, Any] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    accuracy: np.ndarray | None = None
    words: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


@dataclass
class Collection:
    """Runs side by side; left_out: (path, reason) of what is there and no run.

    folder: of the sweep, None where the runs are of no sweep or of several.
    """

    title: str
    runs: list[Run] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    folder: Path | None = None


def collect(directory: Path) -> Collection:
    """The runs of a sweep, or one run. ValueError where the directory is neither."""
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{str(directory)!r} is no directory. Give that of a sweep or of a run, below logs/")
    title = directory.resolve().name
    if (directory / "sweep.json").exists() or (not _is_run(directory) and any(map(_is_run, _numbered(directory)))):
        found = Collection(f"Sweep {title}", *_sweep(directory), directory)
    elif _is_run(directory):
        found = Collection(f"Run {title}", [_read(directory, title)])
    else:
        what = (
            "is empty" if not any(directory.iterdir()) else f"has neither sweep.json nor any of {', '.join(OF_A_RUN)}"
        )
        raise ValueError(f"{str(directory)!r} {what}. Give the directory of a sweep or of a run, below logs/")
    _fill(found.runs)
    return found


def gather(paths: Sequence[Path]) -> Collection:
    """Arbitrary runs, and the runs of sweeps, in the order given; what is none is left out with the reason."""
    found, seen = Collection("Comparison"), set[Path]()
    for path in map(Path, paths):
        try:
            own = collect(path)
        except (ValueError, OSError) as error:
            found.left_out.append((str(path), str(error)))
            continue
        found.left_out += own.left_out
        for run in own.runs:
            if run.dir.resolve() in seen:
                found.left_out.append((str(run.dir), "was given before"))
                continue
            seen.add(run.dir.resolve())
            if own.title.startswith("Sweep"):
                run.name = f"{path.resolve().name}/{run.name}"
            found.runs.append(run)
    names = [run.name for run in found.runs]
    for run in found.runs:
        if names.count(run.name) > 1:
            run.name = str(run.dir)
    _fill(found.runs)
    return found


# --- a sweep -------------------------------------------------------------------------------------------------------


def _sweep(directory: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    record = read_json(directory / "sweep.json")
    jobs = record.get("jobs")
    left_out = []
    if not isinstance(jobs, list):
        jobs = []
        left_out.append(("sweep.json", "missing or damaged; the runs are those of the numbered folders"))
    found = {int(path.name): path for path in _numbered(directory)}
    runs = []
    for number in sorted({*range(len(jobs)), *(number for number, path in found.items() if _is_run(path))}):
        job = jobs[number] if number < len(jobs) and isinstance(jobs[number], dict) else {}
        runs.append(_read(directory / str(number), str(number), job))
    known = {run.name for run in runs}
    for path in sorted(directory.iterdir()):
        if path.name not in known and path.stem not in OF_A_SWEEP and not path.name.startswith("."):
            left_out.append((path.name, _what(path)))
    return runs, left_out


def _what(path: Path) -> str:
    """Why an entry of a sweep's directory is no run."""
    if not path.is_dir():
        return "a file that is no part of a sweep"
    if not any(path.iterdir()):
        return "an empty folder"
    return f"a folder without {', '.join(OF_A_RUN[:-1])} or {OF_A_RUN[-1]}"


def _numbered(directory: Path) -> Iterator[Path]:
    """The numbered folders; 01 is none, as the folder of job 1 is called 1."""
    for path in directory.iterdir():
        if path.name.isascii() and path.name.isdigit() and str(int(path.name)) == path.name and path.is_dir():
            yield path


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in OF_A_RUN)


# --- a run ---------------------------------------------------------------------------------------------------------


def _read(directory: Path, name: str, job: dict[str, Any] | None = None) -> Run:
    """A run, whatever state its directory is in; job: its entry in sweep.json, where it is part of a sweep."""
    job = job or {}
    run = Run(name, directory)
    for part in (_read_result, _read_config, _read_metrics, _read_matrix):
        try:
            part(run)
        except Exception as error:  # each damage is of its own kind, and the other runs are to be shown
            run.remarks.append(f"{part.__name__[6:]} cannot be read ({type(error).__name__}: {error})")
    stated = [status for status in (run.result.get("status"), job.get("status")) if isinstance(status, str)]
    if stated:
        run.status = _text("finished" if "finished" in stated else stated[-1])
    for source in (job, run.result):
        run.overrides = run.overrides or [_text(word) for word in _list(source.get("overrides"))]
        run.metrics = _numbers(source.get("metrics")) or run.metrics
        run.seconds = run.seconds or _number(source.get("seconds"))
    if run.status != "finished":
        run.reason = _text(job.get("reason") or run.result.get("reason") or _unfinished(run))
    if not run.series and run.status != "waiting":
        run.remarks.append(_why_no_curves(directory))
    return run


def _unfinished(run: Run) -> str:
    if run.status == "waiting":
        return "not started"
    if run.status == "running":
        return "had not ended when this was written"
    return "no result.json says how it ended" if run.status == "unknown" else ""


def _why_no_curves(directory: Path) -> str:
    path = directory / "metrics.jsonl"
    if not directory.is_dir():
        return "no curves: its directory is missing"
    if not any(entry for entry in directory.iterdir() if not entry.name.startswith(".")):
        return "no curves: its directory is empty"
    if not path.is_file():
        return "no curves: there is no metrics.jsonl"
    return (
        "no curves: no line of metrics.jsonl can be read"
        if path.stat().st_size
        else "no curves: metrics.jsonl is empty"
    )


def _read_result(run: Run) -> None:
    path = run.dir / "result.json"
    run.result = read_json(path)
    if path.exists() and not run.result:
        run.remarks.append("result.json is damaged")


def _read_config(run: Run) -> None:
    import yaml

    path = run.dir / "config.yaml"
    if not path.is_file():
        return
    with path.open("rb") as file:
        config = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(config, dict):
        run.remarks.append("config.yaml is damaged")
        return
    for key, value in _flat(config):
        if len(run.config) == MOST_KEYS:
            run.remarks.append(f"config.yaml has more than {MOST_KEYS} keys; the rest is left out")
            break
        run.config[_text(key)] = _text(value)


def _flat(value: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and depth < DEEPEST:
        for key, child in value.items():
            yield from _flat(child, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    else:
        yield prefix, shown(value)[:300] if not isinstance(value, dict | list) or depth < DEEPEST else "…"


def _read_metrics(run: Run) -> None:
    path = run.dir / "metrics.jsonl"
    rows = readable(path)
    if path.is_file():
        lines = sum(1 for text in path.read_bytes().split(b"\n") if text.strip())
        if len(rows) < lines and rows:
            run.remarks.append(f"{lines - len(rows)} of {lines} lines of metrics.jsonl cannot be read")
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        step = row["step"]
        if isinstance(step, bool) or abs(step) > EXACT:
            continue
        for name, value in row.items():
            if name != "step" and type(value) in (float, int) and not (type(value) is int and abs(value) > EXACT):
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    run.series = {_text(name): _ascending(*pair) for name, pair in found.items()}


def _ascending(steps: list[int], values: list[float]) -> Series:
    """Of a step that was logged twice, the last value holds."""
    at, what = np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)
    if len(at) > 1 and (np.diff(at) <= 0).any():
        order = np.argsort(at, kind="stable")
        at, what = at[order], what[order]
        last = np.append(np.diff(at) > 0, True)
        at, what = at[last], what[last]
    return Series(at, what)


def _read_matrix(run: Run) -> None:
    path = run.dir / "accuracy_matrix.csv"
    if path.is_file():
        run.accuracy = read_matrix(path)


def _numbers(value: Any) -> dict[str, float]:
    found = {str(name): _number(number) for name, number in value.items()} if isinstance(value, dict) else {}
    return {_text(name): number for name, number in found.items() if number is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return NON_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if isinstance(value, float) or abs(value) <= EXACT else math.copysign(math.inf, value)


def _text(value: Any) -> str:
    """`value` as text that can be written to a file: JSON's escapes can name halves of characters."""
    return str(value).encode("utf-8", "replace").decode()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# --- words ---------------------------------------------------------------------------------------------------------


def _fill(runs: Sequence[Run]) -> None:
    """Gives every run a word for each key that any run was asked for.

    Where runs of one sweep all have the same keys this adds nothing; runs that were started one by one leave out what
    is the default, and then their configuration knows it.
    """
    asked = [_pairs(run.overrides) for run in runs]
    keys = dict.fromkeys(key for words in asked for key in words)
    keys = [key for key in keys if key not in ELSEWHERE and not key.startswith(ELSEWHERE_BELOW)]
    for run, words in zip(runs, asked, strict=True):
        run.words = {key: words[key] if key in words else _configured(run, key) for key in keys}


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    cut = [word.partition("=") for word in overrides]
    return {key: value for key, _, value in cut}


def _configured(run: Run, key: str) -> str:
    plain = key.lstrip("+~")
    chosen = run.config.get(f"choices.{plain}", run.config.get(plain))
    return "" if chosen is None else chosen


def relative(path: Path, folder: Path) -> str:
    """`path` as a link from a page in `folder`."""
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
