"""Where metrics go: metrics.jsonl in every run, and one of `logger=wandb|csv|tensorboard|none`.

A choice is called with run_dir, log_dir, run_id, name, config, group and resumed, and returns a Lightning logger or
a list of them. W&B has a file of its own, wandb.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from io import FileIO
from math import inf
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from trainkit.launch.disk import writing
from trainkit.launch.rundir import write_text
from trainkit.report.metrics_file import Row, line, parse, readable


class JsonlLogger(Logger):
    """Writes <run_dir>/metrics.jsonl: one line per step, handed to the operating system as soon as it is known.

    What is logged for the step of the last line is merged into that line, in place. A file that exists is continued;
    a torn last line is overwritten.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.path = Path(run_dir) / "metrics.jsonl"
        self._file: FileIO | None = None  # without a buffer, which on a full disk would be written again at the end
        self._start = 0  # where the last line begins
        self._last: Row = {}

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        file = self._open()
        step = self._last.get("step", 0) if step is None else int(step)
        merged = step == self._last.get("step")
        if not merged:
            self._start, self._last = file.seek(0, 2), {"step": step}
        self._last |= metrics
        rest = memoryview(line(self._last).encode())
        with writing(self.path, self.path.parent):
            if merged:
                file.seek(self._start)
            while rest:
                rest = rest[file.write(rest) :]
            if merged:
                file.truncate()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in config.yaml, next to this file."""

    @rank_zero_only
    def truncate_after(self, step: int) -> None:
        """Drops the lines beyond `step`, to continue from the checkpoint made there."""
        self._keep(self._open(), step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> FileIO:
        if self._file is None:
            with writing(self.path, self.path.parent):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.touch()
                self._file = FileIO(self.path, "r+")
            self._keep(self._file)
        return self._file

    def _keep(self, file: FileIO, last_step: float = inf) -> None:
        """Cuts the file behind its last whole line of a step up to `last_step`, which becomes the last line."""
        position = end = self._start = 0
        self._last = {}
        file.seek(0)
        for text in file.read().splitlines(keepends=True):
            row = parse(text) if text.endswith(b"\n") else None
            if row is not None and row["step"] > last_step:
                break
            if row is not None:
                self._start, self._last, end = position, row, position + len(text)
            position += len(text)
        file.truncate(end)


class CsvLogger(Logger):
    """Writes <run_dir>/metrics.csv: the rows of metrics.jsonl as a table, one column per metric.

    A metric that was not there before adds a column: the file is then made anew from metrics.jsonl, as it is when a
    run is continued, so one file holds the whole run. Stands behind JsonlLogger, which has the row of a call already.
    """

    def __init__(self, run_dir: str | Path):
        super().__init__()
        self.source, self.path = Path(run_dir) / "metrics.jsonl", Path(run_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._start = 0  # where the last row begins
        self._last: Row = {}

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = self._last.get("step", 0) if step is None else int(step)
        if not self._columns or not set(metrics) <= set(self._columns):
            with writing(self.path, self.path.parent):
                self._rebuild()
            return
        with writing(self.path, self.path.parent), self.path.open("r+b") as file:
            if step != self._last.get("step"):
                self._start, self._last = file.seek(0, 2), {"step": step}
            self._last |= metrics
            file.seek(self._start)
            file.write(self._text([self._last]).encode())
            file.truncate()

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration stands in config.yaml, next to this file."""

    def _rebuild(self) -> None:
        rows = readable(self.source)
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        head = self._text([{name: name for name in self._columns}, *rows[:-1]])
        self._start, self._last = len(head.encode()), rows[-1]
        write_text(self.path, head + self._text(rows[-1:]))

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        for row in rows:
            table.writerow([_plain(row.get(name, "")) for name in self._columns])
        return text.getvalue()


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int)) else float(value)


def csv_logger(*, run_dir: Path, **_: Any) -> CsvLogger:
    """<run_dir>/metrics.csv, one row per logging step."""
    return CsvLogger(run_dir)


def tensorboard_logger(*, run_dir: Path, **_: Any) -> TensorBoardLogger:
    """<run_dir>/tensorboard/events.…; show with `tensorboard --logdir`."""
    return TensorBoardLogger(save_dir=run_dir, name="tensorboard", version="", default_hp_metric=False)


def no_logger(**_: Any) -> list[Logger]:
    """Nothing beyond metrics.jsonl."""
    return []
