"""What a corpus is made of, and which of it is for training, validation and test.

A document is a text file, or one row of a .jsonl, .parquet or hub data set. Of many documents, 90 % are drawn for
training, 5 % for validation and 5 % for test by a hash of their key (a file's relative path, a row's text), so that a
document keeps its part when others are added, and equal rows share one. Fewer than FEW documents are laid end to end
and cut by position instead, 90/5/5, because by a hash a part could stay empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from mmap import mmap
from typing import NamedTuple

PARTS: tuple[str, ...] = ("train", "val", "test")
TRAIN_END, VAL_END = 0.90, 0.95
FEW = 200  # with 200 documents, a part of 5 % is empty once in 28000 corpora
PIECE = 1 << 20  # bytes: long documents are encoded piece by piece, so that memory stays bounded


class Document(NamedTuple):
    """key: what the part is drawn from; data: UTF-8 text; part: train, val or test where the source decides it."""

    key: bytes
    data: bytes | mmap
    part: str | None = None


class Piece(NamedTuple):
    """A stretch of a document that is encoded at once; ends: with it, the document is complete."""

    part: str
    data: bytes
    ends: bool


def drawn(key: bytes) -> str:
    """The part of a document by its key alone."""
    share = int.from_bytes(blake2b(key, digest_size=4).digest(), "big") / 2**32
    return "train" if share < TRAIN_END else "val" if share < VAL_END else "test"


def pieces(documents: Iterable[Document]) -> Iterator[Piece]:
    """All documents in their order, assigned to parts and cut into pieces. Raises ValueError where one is not UTF-8."""
    few: list[Document] = []
    many = False
    for document in documents:
        if document.part or many:
            yield from _cut(document, document.part or drawn(document.key), 0, len(document.data))
            continue
        few.append(document)
        if len(few) == FEW:
            many = True
            for earlier in few:
                yield from _cut(earlier, drawn(earlier.key), 0, len(earlier.data))
    if not many:
        yield from _by_position(few)


def _by_position(documents: list[Document]) -> Iterator[Piece]:
    total = sum(len(document.data) for document in documents)
    ends = [int(TRAIN_END * total), int(VAL_END * total), total]
    offset = 0
    for document in documents:
        size, start = len(document.data), 0
        for part, end in zip(PARTS, ends, strict=True):
            stop = _character(document.data, min(max(end - offset, 0), size))
            if start < stop:
                yield from _cut(document, part, start, stop)
                start = stop
        offset += size


def _cut(document: Document, part: str, start: int, stop: int) -> Iterator[Piece]:
    while start < stop:
        end = stop if stop - start <= PIECE else _word(document.data, start, start + PIECE)
        data = document.data[start:end]
        try:
            data.decode()
        except UnicodeDecodeError as error:
            at = start + error.start
            raise ValueError(
                f"text must be UTF-8; {document.key.decode()} has the byte 0x{document.data[at]:02x} at offset {at}. "
                "Convert the file (iconv -f LATIN1 -t UTF-8) or leave it out (data.path='DIR/**/*.txt')"
            ) from None
        yield Piece(part, data, ends=end == len(document.data))
        start = end


def _word(data: bytes | mmap, start: int, limit: int) -> int:
    """Where to cut in front of `limit`: after a line, else after a word, else between two characters."""
    for mark in (b"\n", b" "):
        at = data.rfind(mark, (start + limit) // 2, limit)
        if at >= 0:
            return at + 1
    return _character(data, limit)


def _character(data: bytes | mmap, position: int) -> int:
    """The last position up to `position` at which a UTF-8 character starts."""
    for start in range(position, max(position - 4, -1), -1):
        if start == len(data) or data[start] & 0xC0 != 0x80:
            return start
    return position
