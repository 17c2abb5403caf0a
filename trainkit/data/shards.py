"""Text to token files that data=stream reads: one row of tokens per part, cut into files of equal length.

    DIR/{train,val,test}_000000.npy …  index.json  [tokenizer.json]

They are made in a hidden folder beside DIR, which takes its name when all is written and safe on disk. What has been
done is noted as it goes, so the same command goes on where it was stopped, and the files are the same bytes as if it
had not been.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from trainkit.data.corpus import UNWRITABLE, key, locked
from trainkit.data.documents import PARTS, pieces
from trainkit.data.encoding import Encoder, batches, training
from trainkit.data.progress import Meter
from trainkit.data.shard_files import look
from trainkit.data.shard_index import FORMAT, INDEX
from trainkit.data.sync import sync
from trainkit.data.tokenizer import FILE, codec_fingerprint, load_codec, make_codec
from trainkit.data.tokens import Tokens

log = logging.getLogger(__name__)
STATE = "state.npz"
SECONDS = 20.0  # between two notes of what has been done


def write(target: Path, text: Tokens, shard_tokens: int) -> None:
    """Encodes a text into the folder `target`, which is new or empty, in files of `shard_tokens` tokens each.

    Only the last file of a part is shorter. Raises ValueError where the folder holds something else, or the beginning
    of other shards lies beside it.
    """
    if shard_tokens < 1:
        raise ValueError(f"a shard must have at least 1 token; got {shard_tokens}")
    settings = text.tokenizer_settings()
    made_of = key(text.source_name, text.fingerprint(), codec_fingerprint(**settings), shard_tokens)
    partial = target.parent / f".{target.name}.partial"
    if _finished(target, made_of):
        return
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with locked(partial / "shards"):
            if not _finished(target, made_of):
                _write(partial, text, shard_tokens, made_of)
                (partial / ".shards.lock").unlink()
                for path in (*partial.iterdir(), partial):
                    sync(path)
                partial.replace(target)
                sync(target.parent)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = error.filename or target.parent
        raise ValueError(f"{target} must lie where there is room to write; {where}: {error.strerror}") from None


def _finished(target: Path, made_of: str) -> bool:
    """Whether these shards are there. Raises ValueError where something else is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        same = json.loads((target / INDEX).read_text())["made_of"] == made_of
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ValueError(f"{target} must be a new or empty folder; it holds something else. Give another, or remove it")
    log.info("%s is complete: nothing to do", target)
    return True


def _write(folder: Path, text: Tokens, shard_tokens: int, made_of: str) -> None:
    began, noted = time.monotonic(), time.monotonic()
    state, counts = _noted(folder, made_of)
    if not state:
        for remains in folder.glob("[!.]*"):
            remains.unlink()
        make_codec(folder, training(text.documents()), **text.tokenizer_settings())
    encoder = Encoder(load_codec(folder))
    done = state.get("batches", 0)
    if done:
        encoder.counts, encoder.documents, encoder.bytes = counts, state["documents"], state["bytes"]
        log.info("going on with %s after %s", folder, " + ".join(f"{n:,} {p}" for p, n in encoder.tokens().items()))
    with ExitStack() as stack:
        rows = {
            part: stack.enter_context(Row(folder, part, encoder.dtype, shard_tokens, state.get("rows", {}).get(part)))
            for part in PARTS
        }
        meter = stack.enter_context(Meter(f"encoding data={text.source_name}", text.size()))
        for number, batch in enumerate(batches(pieces(text.documents())), 1):
            if number > done:
                for part, tokens in encoder.encode(batch).items():
                    rows[part].add(tokens)
            if number > done and time.monotonic() > noted + SECONDS:
                _note(folder, made_of, number, encoder, rows)
                noted = time.monotonic()
            meter.advance(sum(len(piece.data) for piece in batch))
        shards = {part: row.finish() for part, row in rows.items()}
    about = {"format": FORMAT, "tokenizer": "file" if (folder / FILE).exists() else "byte", "made_of": made_of}
    (folder / INDEX).write_text(json.dumps(about | encoder.facts() | {"shards": shards}, indent=1))
    (folder / STATE).unlink(missing_ok=True)
    numbers = " + ".join(f"{count:,} {part}" for part, count in encoder.tokens().items())
    log.info("encoded in %.1f s: %s tokens", time.monotonic() - began, numbers)


class Row:
    """The tokens of a part, as files that are full, and one that is being filled. entry: how far it had come."""

    def __init__(self, folder: Path, part: str, dtype: type[np.generic], size: int, entry: dict[str, Any] | None):
        self.folder, self.part, self.dtype, self.size = folder, part, np.dtype(dtype).newbyteorder("<"), size
        self.shards: list[dict[str, Any]] = entry["shards"] if entry else []
        self.count = entry["count"] if entry else 0  # tokens in the file that is being filled
        for path in sorted(folder.glob(f"{part}_*.npy"))[len(self.shards) + 1 :]:
            path.unlink()  # begun after the state was noted
        self.file = self._open()

    def add(self, tokens: np.ndarray) -> None:
        while len(tokens):
            fits, tokens = np.split(tokens, [self.size - self.count])
            self.file.write(fits.astype(self.dtype, copy=False).data)
            self.count += len(fits)
            if self.count == self.size:
                self._close()
                self.file = self._open()

    def entry(self) -> dict[str, Any]:
        """How far it has come, safe on disk."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return {"shards": self.shards, "count": self.count}

    def finish(self) -> list[dict[str, Any]]:
        """Name, number of tokens and digest of each file."""
        if self.count:
            self._close()
        else:
            self.file.close()
            self._path().unlink()
        return self.shards

    def __enter__(self) -> Row:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _path(self) -> Path:
        return self.folder / f"{self.part}_{len(self.shards):06}.npy"

    def _open(self) -> Any:
        file = open(self._path(), "r+b" if self.count else "w+b")  # noqa: SIM115
        self._head(file)
        file.truncate(file.tell() + self.count * self.dtype.itemsize)
        file.seek(0, os.SEEK_END)
        return file

    def _close(self) -> None:
        self._head(self.file)
        self.file.close()
        path, self.count = self._path(), 0
        shard = look(path)
        self.shards.append({"name": path.name, "tokens": shard.tokens, "digest": shard.probe()[0]})

    def _head(self, file: Any) -> None:
        """Writes numpy's header, which is as long for every number of tokens (numpy leaves room for the digits)."""
        file.seek(0)
        descr = npy.dtype_to_descr(self.dtype)
        npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (self.count,)})


def _note(folder: Path, made_of: str, number: int, encoder: Encoder, rows: dict[str, Row]) -> None:
    state = {"made_of": made_of, "batches": number, "documents": encoder.documents, "bytes": encoder.bytes}
    state["rows"] = {part: row.entry() for part, row in rows.items()}
    new = folder / f".{STATE}"
    with open(new, "wb") as file:
        np.savez(file, allow_pickle=False, state=np.frombuffer(json.dumps(state).encode(), np.uint8), **encoder.counts)
        file.flush()
        os.fsync(file.fileno())
    new.replace(folder / STATE)


def _noted(folder: Path, made_of: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What had been done in an earlier call, and the counts of tokens; both empty where there was none."""
    if not (folder / STATE).exists():
        return {}, {}
    with np.load(folder / STATE) as saved:
        state = json.loads(saved["state"].tobytes())
        if state["made_of"] != made_of:
            raise ValueError(f"{folder} holds the beginning of other shards, of another text or tokenizer; remove it")
        return state, {part: saved[part] for part in PARTS}
