"""Documents to token arrays on disk, in one pass over the text."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from trainkit.data.documents import PARTS, Document, Piece, pieces
from trainkit.data.progress import Meter
from trainkit.data.tokenizer import Codec

log = logging.getLogger(__name__)
BATCH = 1 << 23  # bytes encoded at once


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
