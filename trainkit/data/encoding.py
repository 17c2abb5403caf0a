"""Documents to token arrays on disk, in one pass over the text."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.documents import PARTS, Document, Piece, pieces
from trainkit.data.progress import Meter
from trainkit.data.tokenizer import Codec

log = logging.getLogger(__name__)
BATCH = 1 << 23  # bytes encoded at once


class Encoder:
    """Encodes pieces of documents, and counts: `counts` of each token, `documents` and `bytes`, for each part."""

    def __init__(self, codec: Codec):
        self.codec = codec
        self.dtype = np.uint8 if codec.vocab <= 1 << 8 else np.uint16 if codec.vocab <= 1 << 16 else np.uint32
        self.counts = {part: np.zeros(codec.vocab, np.int64) for part in PARTS}
        self.documents, self.bytes = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)

    def encode(self, batch: list[Piece]) -> dict[str, np.ndarray]:
        """The tokens of these pieces by part; a separator follows each document."""
        separator = np.array(self.codec.separator, self.dtype)
        rows: dict[str, list[np.ndarray]] = {part: [np.empty(0, self.dtype)] for part in PARTS}
        for piece, tokens in zip(batch, self.codec.encode_many([piece.data for piece in batch]), strict=True):
            rows[piece.part] += [tokens, separator] if piece.ends else [tokens]
            self.documents[piece.part] += piece.ends
            self.bytes[piece.part] += len(piece.data)
        joined = {part: np.concatenate(arrays).astype(self.dtype, copy=False) for part, arrays in rows.items()}
        for part, tokens in joined.items():
            self.counts[part] += np.bincount(tokens, minlength=self.codec.vocab)
        return joined

    def tokens(self) -> dict[str, int]:
        return {part: int(count.sum()) for part, count in self.counts.items()}

    def facts(self) -> dict[str, Any]:
        """What is told about the text; the words of trainkit.data.corpus.Corpus."""
        separators = self.documents["val"] * bool(self.codec.separator)
        return {
            "vocab": self.codec.vocab,
            "dtype": np.dtype(self.dtype).name,
            "tokens": self.tokens(),
            "documents": dict(self.documents),
            "bytes_per_token": (self.bytes["val"] + separators) / max(self.tokens()["val"], 1),
            "unigram_entropy": cross_entropy(self.counts["train"], self.counts["val"]),
        }


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
    encoder = Encoder(make_codec(folder, training(documents())))
    with ExitStack() as stack:
        meter = stack.enter_context(Meter(f"preparing {label}", size()))
        files = {part: stack.enter_context(open(folder / f"{part}.bin", "wb")) for part in PARTS}
        for batch in batches(pieces(documents())):
            for part, tokens in encoder.encode(batch).items():
                tokens.tofile(files[part])
            meter.advance(sum(len(piece.data) for piece in batch))
    (folder / "meta.json").write_text(json.dumps(encoder.facts(), indent=1))
    numbers = " + ".join(f"{count:,} {part}" for part, count in encoder.tokens().items())
    log.info("prepared %s in %.1f s: %s tokens", label, time.monotonic() - began, numbers)


def training(documents: Iterable[Document]) -> Iterator[bytes]:
    """The text of the training part."""
    return (piece.data for piece in pieces(documents) if piece.part == "train")


def cross_entropy(train: np.ndarray, val: np.ndarray) -> float:
    """- sum_v q_v ln p_v; q: frequencies in `val`; p: those in `train`, every count raised by one."""
    p = (train + 1) / (train.sum() + len(train))
    return float(-(val * np.log(p)).sum() / max(val.sum(), 1))


def batches(stream: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces, so many at once as are encoded together."""
    batch, size = [], 0
    for piece in stream:
        batch.append(piece)
        size += len(piece.data)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
