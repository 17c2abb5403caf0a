"""What a disk that is full, read-only or broken is called, instead of a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainkit.launch.explain import UserError

REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than the file system or ulimit -f allows",
    errno.EROFS: "the file system has become read-only",
    errno.EIO: "the disk has failed (input/output error)",
}


class DiskError(UserError):
    """A file that a run needs could not be written; what was there before is intact."""

    exit_code = 1  # nothing was wrong with what was typed


@contextmanager
def writing(path: Path, run: Path) -> Iterator[None]:
    """Turns an OSError that means the disk, raised while `path` of the run in `run` is written, into a DiskError."""
    try:
        yield
    except OSError as error:
        if error.errno not in REASONS:
            raise
        raise DiskError(
            f"cannot write {path}: {REASONS[error.errno]}; the run has stopped and its older checkpoints are intact",
            f"make room there (or move the run's directory to another disk), then go on: python run.py resume={run}",
        ) from error
