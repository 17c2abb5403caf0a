"""How far a long preparation is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

log = logging.getLogger(__name__)
SECONDS = 5.0  # between plain lines


class Meter:
    """Counts bytes under a label; total: how many there will be, None where that is not known."""

    def __init__(self, label: str, total: int | None):
        self.label, self.total, self.done = label, total, 0
        self.bar: Any = None

    def __enter__(self) -> Meter:
        self.next_line = time.monotonic() + SECONDS
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total)
        return self

    def advance(self, size: int) -> None:
        self.done += size
        if self.bar:
            self.bar.advance(self.task, size)
        elif time.monotonic() > self.next_line:
            self.next_line = time.monotonic() + SECONDS
            of_total = f" of {self.total / 1e6:.0f} ({self.done / self.total:.0%})" if self.total else ""
            log.info("%s: %.0f%s MB", self.label, self.done / 1e6, of_total)

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()
