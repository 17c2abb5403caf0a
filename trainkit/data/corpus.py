"""A corpus as memory-mapped token arrays in the cache: built once, by one process, all or nothing.

    <cache_dir>/corpora/<source>-<key>/{train,val,test}.bin  meta.json  [tokenizer.json]

The key is a hash of all that the tokens depend on, so a folder that exists under its final name is right.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.documents import PARTS
from trainkit.data.sync import sync

log = logging.getLogger(__name__)
FORMAT = 1  # raised when the same sources would give other files
# What an OSError says when the cache, and not the program, is at fault.
UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST}


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus. tokens and documents: how many per part.

    bytes_per_token: of the validation text, a separator counted as one byte, so that bits per byte compare between
    tokenizers. unigram_entropy: nats per token of the validation part under the training part's frequencies, each
    count raised by one (a token that training lacks would make it infinite).
    """

    folder: Path
    vocab: int
    dtype: str
    tokens: dict[str, int]
    documents: dict[str, int]
    bytes_per_token: float
    unigram_entropy: float

    def open(self, part: str) -> np.ndarray:
        """The tokens of a part, on disk: (tokens[part],)."""
        return np.memmap(self.folder / f"{part}.bin", dtype=self.dtype, mode="r", shape=(self.tokens[part],))


def key(*parts: Any) -> str:
    """A short name for all that a corpus depends on."""
    return blake2b(json.dumps([FORMAT, *parts]).encode(), digest_size=8).hexdigest()


def find(folder: Path) -> Corpus | None:
    """The corpus in a folder; None where there is none, or a file of it was cut short."""
    try:
        corpus = Corpus(folder, **json.loads((folder / "meta.json").read_text()))
        sizes = {part: (folder / f"{part}.bin").stat().st_size for part in PARTS}
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    width = np.dtype(corpus.dtype).itemsize
    return corpus if sizes == {part: count * width for part, count in corpus.tokens.items()} else None


def prepare(folder: Path, build: Callable[[Path], None]) -> Corpus:
    """Finds the corpus or has `build` write it; of several processes one builds and the others wait for it.

    It is built under another name and renamed when it is safe on disk: an end at any moment leaves nothing behind that
    could be taken for a corpus. Raises ValueError where the cache cannot be written.
    """
    if corpus := find(folder):
        return corpus
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder) as alone:
            if corpus := find(folder):
                return corpus
            for remains in folder.parent.glob(f".{folder.name}.*.partial") if alone else ():
                shutil.rmtree(remains, ignore_errors=True)
            partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
            partial.mkdir()
            try:
                build(partial)
                for path in (*partial.iterdir(), partial):
                    sync(path)
                shutil.rmtree(folder, ignore_errors=True)  # one that was cut short
                partial.rename(folder)
                sync(folder.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in UNWRITABLE:
            fact = f"{error.filename or folder.parent}: {error.strerror}"
            raise ValueError(f"paths.cache_dir must be a writable folder with room; {fact}. Try another one") from None
        raise
    corpus = find(folder)
    assert corpus, f"{folder} was built incompletely"
    return corpus


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds a lock on the corpus; False where the file system has no locks (renaming stays safe without)."""
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("waiting for another process that is preparing %s", folder)
                fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError:
            held = False
        yield held
