"""Which token files are for training, validation and test, and what is known about them.

A folder written by `python -m trainkit.data shards` has an index.json that says all of it. Files of others are told
apart by their names: one with val, valid, validation or dev as a word of its path is for validation, one with test for
test, every other one for training.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.documents import PARTS
from trainkit.data.paths import files_at
from trainkit.data.shard_files import DTYPES, SUFFIXES, Shard, Shards, beyond, look

log = logging.getLogger(__name__)
INDEX = "index.json"
FORMAT = 1
WORDS = {"val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_LACKS = {
    "train": "training: .npy or .bin, with no val or test in their names. Give a folder or a glob of such files",
    "val": "validation. Give more text to `python -m trainkit.data shards`, or name them by data.val_path",
}
KEYS = {"vocab": int, "dtype": str, "shards": dict}  # what an index says
ENTRY = {"name": str, "tokens": int, "digest": str}  # and of each file
AT_ONCE = 16  # files that are looked at together: on a shared file system each takes its time


@dataclass(frozen=True)
class Collection:
    """Token files by part; about: the index, empty for files of others; folder: where the index lies."""

    parts: dict[str, Shards]
    fingerprint: str
    folder: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def collect(path: str, *, val_path: str | None, dtype: str | None, vocab: int | None) -> Collection:
    """The token files at `path`, a folder, a file or a glob, looked at but not read.

    val_path: those for validation, where names do not tell; dtype: of files that do not say their type; vocab: how many
    tokens there are, where there is no index. Raises ValueError where a file is missing, cut short or another one than
    the index says, where tokens do not fit the vocabulary, and where there is nothing to train on or to validate on.
    """
    folder = Path(path).expanduser()
    if (folder / INDEX).is_file():
        for key, value in (("val_path", val_path), ("dtype", dtype)):
            if value is not None:
                raise ValueError(
                    f"data.{key} is for files without an index, and {folder / INDEX} says it; leave it out"
                )
        about = _index(folder / INDEX)
        named = {part: [folder / entry["name"] for entry in about["shards"][part]] for part in PARTS}
    else:
        if vocab is None:
            raise ValueError(
                f"data.vocab must be given, as {path} has no {INDEX}: how many tokens there are (GPT-2: 50257)"
            )
        about, named = {}, _by_name(path, val_path)
    size = about.get("vocab", vocab)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"data.dtype is one of {', '.join(DTYPES)}; got {dtype!r}")
    unsaid = dtype or ("uint16" if size <= 1 << 16 else "uint32")
    parts, digests = {}, {}
    for part, paths in named.items():
        if not paths and part != "test":
            raise ValueError(f"data.path={path} has no files for {_LACKS[part]}")
        with ThreadPoolExecutor(AT_ONCE) as pool:
            shards = list(pool.map(lambda path: look(path, unsaid), paths))
            probes = list(pool.map(Shard.probe, shards))
        for shard, (_, largest) in zip(shards, probes, strict=True):
            _check_vocab(shard, largest, size)
        digests[part] = [digest for digest, _ in probes]
        if about:
            _compare(shards, digests[part], about["shards"][part], about["dtype"])
        if shards:
            parts[part] = Shards(shards, size)
    if "test" not in parts:
        log.info("data.path=%s has no files for test; the test is on those for validation", path)
        parts["test"] = parts["val"]
    fingerprint = blake2b(json.dumps(digests).encode(), digest_size=8).hexdigest()
    return Collection(parts, fingerprint, folder if about else None, about)


def _index(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text())
        known = about["format"] == FORMAT
        lacks: list[str] = []
        if known:
            lacks = [key for key, kind in KEYS.items() if not isinstance(about.get(key), kind)]
            entries = [] if lacks else [entry for part in PARTS for entry in about["shards"][part]]
            lacks += [
                f"shards.{key}" for key, kind in ENTRY.items() if not all(isinstance(e[key], kind) for e in entries)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error!r}. Copy it again, or write the shards again") from None
    if not known:
        raise ValueError(f"{path} must be of format {FORMAT}; it has {about['format']}. Write the shards again")
    if lacks:
        raise ValueError(f"{path} does not say its {' and '.join(lacks)}. Copy it again, or write the shards again")
    return about


def _by_name(path: str, val_path: str | None) -> dict[str, list[Path]]:
    """The files of others, each with its part."""
    named: dict[str, list[Path]] = {part: [] for part in PARTS}
    if val_path is not None:
        named["val"] = [file for _, file in files_at(val_path, "data.val_path") if file.suffix in SUFFIXES]
    taken = {file.resolve() for file in named["val"]}
    for name, file in files_at(path):
        if file.suffix not in SUFFIXES or file.resolve() in taken:
            continue
        words = re.split(r"[^a-z]+", name.lower())
        part = next((WORDS[word] for word in words if word in WORDS), "train")
        named["train" if part == "val" and val_path is not None else part].append(file)
    return named


def _check_vocab(shard: Shard, largest: int, vocab: int) -> None:
    if np.iinfo(shard.dtype).max < vocab - 1:
        raise ValueError(
            f"{shard.path} is of {shard.dtype}, which cannot hold all of data.vocab={vocab} tokens. Set the data.vocab "
            "of the tokenizer, or data.dtype where the file does not say its type"
        )
    if largest >= vocab:
        raise ValueError(beyond(shard, largest, vocab))


def _compare(shards: list[Shard], digests: list[str], entries: list[dict[str, Any]], dtype: str) -> None:
    for shard, digest, entry in zip(shards, digests, entries, strict=True):
        if shard.tokens != entry["tokens"] or shard.dtype != dtype:
            raise ValueError(
                f"{shard.path} has {shard.tokens:,} tokens of {shard.dtype}, and {INDEX} beside it says "
                f"{entry['tokens']:,} of {dtype}. Copy both again, or write the shards again"
            )
        if digest != entry["digest"]:
            raise ValueError(
                f"{shard.path} holds other tokens than when it was written. Copy it again, or write the shards again"
            )
