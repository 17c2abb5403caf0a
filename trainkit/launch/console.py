"""What a run says: to the terminal, and the same text to its run.log."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger("trainkit")

# Lightning's own calls of deprecated functions, and advice that does not apply: to loaders that need no workers, on a
# machine that merely has SLURM installed.
KNOWN_NOISE = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"The '\w+_dataloader' does not have many workers",
    r"The `srun` command is available on your system but is not used",
)


def to_terminal() -> None:
    """Sends our own lines to standard output, once per process."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def to_file(path: Path) -> Iterator[None]:
    """Copies our lines, Lightning's and Python's warnings to a file, while the context is open."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logging.captureWarnings(True)
    listened = [log, logging.getLogger("lightning.pytorch"), logging.getLogger("py.warnings")]
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setFormatter(logging.Formatter("%(message)s"))
    listened[-1].addHandler(to_stderr)
    for logger in listened:
        logger.addHandler(handler)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        listened[-1].removeHandler(to_stderr)
        for logger in listened:
            logger.removeHandler(handler)
        handler.close()


def show(*renderables: Any) -> None:
    """Prints rich tables and trees: in colour on a terminal, as plain text elsewhere and in run.log."""
    from rich.console import Console

    for renderable in renderables:
        plain = Console(file=io.StringIO(), width=110, no_color=True)
        plain.print(renderable)
        text = plain.file.getvalue().rstrip()  # type: ignore[attr-defined]
        if sys.stdout.isatty():
            Console().print(renderable)
            for handler in log.handlers:
                if isinstance(handler, logging.FileHandler):
                    handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, text, (), None))
        else:
            log.info("%s", text)
