"""A corpus as memory-mapped token arrays in the cache: built once, by one process, all or nothing.

    <cache_dir>/corpora/<source>-<key>/{train,val,test}.bin  meta.json  [tokenizer.json]

The key is a hash of all that the tokens depend on, so a folder that exists under its final name is right.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.documents import PARTS, Document, Piece, pieces
from trainkit.data.progress import Meter
from trainkit.data.tokenizer import Codec

log = logging.getLogger(__name__)
FORMAT = 1  # raised when the same sources would give other files
BATCH = 1 << 23  # bytes encoded at once
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
        with _locked(folder) as alone:
            if corpus := find(folder):
                return corpus
            for remains in folder.parent.glob(f".{folder.name}.*.partial") if alone else ():
                shutil.rmtree(remains, ignore_errors=True)
            partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
            partial.mkdir()
            try:
                build(partial)
                for path in (*partial.iterdir(), partial):
                    _sync(path)
                shutil.rmtree(folder, ignore_errors=True)  # one that was cut short
                partial.rename(folder)
                _sync(folder.parent)
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
def _locked(folder: Path) -> Iterator[bool]:
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(
    folder: Path,
    documents: Callable[[], Iterable[Document]],
    *,
    label: str,
    size: Callable[[], int | None],
    make_codec: Callable[[Path, Iterable[bytes]], Codec],
) -> None:
    """Encodes all documents into an empty folder. size: tells their bytes, where known."""
    began = time.monotonic()
    codec = make_codec(folder, (piece.data for piece in pieces(documents()) if piece.part == "train"))
    dtype = np.uint8 if codec.vocab <= 1 << 8 else np.uint16 if codec.vocab <= 1 << 16 else np.uint32
    separator = np.array(codec.separator, dtype)
    counts = {part: np.zeros(codec.vocab, np.int64) for part in PARTS}
    ended, sizes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    with ExitStack() as stack:
        meter = stack.enter_context(Meter(f"preparing {label}", size()))
        files = {part: stack.enter_context(open(folder / f"{part}.bin", "wb")) for part in PARTS}
        for batch in _batches(pieces(documents())):
            encoded = codec.encode_many([piece.data for piece in batch])
            rows: dict[str, list[np.ndarray]] = {part: [np.empty(0, dtype)] for part in PARTS}
            for piece, tokens in zip(batch, encoded, strict=True):
                rows[piece.part] += [tokens, separator] if piece.ends else [tokens]
                ended[piece.part] += piece.ends
                sizes[piece.part] += len(piece.data)
            for part, arrays in rows.items():
                joined = np.concatenate(arrays).astype(dtype, copy=False)
                counts[part] += np.bincount(joined, minlength=codec.vocab)
                joined.tofile(files[part])
            meter.advance(sum(len(piece.data) for piece in batch))
    tokens = {part: int(count.sum()) for part, count in counts.items()}
    facts = {
        "vocab": codec.vocab,
        "dtype": np.dtype(dtype).name,
        "tokens": tokens,
        "documents": ended,
        "bytes_per_token": (sizes["val"] + ended["val"] * bool(codec.separator)) / max(tokens["val"], 1),
        "unigram_entropy": cross_entropy(counts["train"], counts["val"]),
    }
    (folder / "meta.json").write_text(json.dumps(facts, indent=1))
    numbers = " + ".join(f"{tokens[part]:,} {part}" for part in PARTS)
    log.info("prepared %s in %.1f s: %s tokens", label, time.monotonic() - began, numbers)


def cross_entropy(train: np.ndarray, val: np.ndarray) -> float:
    """- sum_v q_v ln p_v; q: frequencies in `val`; p: those in `train`, every count raised by one."""
    p = (train + 1) / (train.sum() + len(train))
    return float(-(val * np.log(p)).sum() / max(val.sum(), 1))


def _batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.data)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
