"""Token files: what is in one, and reading stretches of many.

    .npy               numpy's own format, one axis of integers
    .bin of llm.c      256 int32 (magic, version, number of tokens, zeros), then the tokens
    .bin of nanoGPT    the tokens and nothing else (so is Megatron's, beside its .idx)

Tokens are read by position and not through a memory map: a map of a corpus that memory does not hold is slower (a page
comes with its neighbours, which a shuffled order does not want), fills the process's resident set, and ends the process
without a word where a file is cut short meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DTYPES = ("uint8", "uint16", "int32", "uint32", "int64")
LLM_C = {20240520: (1, "uint16"), 20240801: (7, "uint32")}  # magic: version and type, of GPT-2 and of Llama 3
HEADER = 1024  # bytes of llm.c's
SUFFIXES = (".npy", ".bin")
OPEN = 256  # files open at once: systems allow a process about 1000
PROBES, PROBE = 4, 4096  # the stretches of a file that its digest is made of, and the bytes of each


@dataclass(frozen=True)
class Shard:
    """A file of `tokens` tokens, little-endian; they begin `offset` bytes into it."""

    path: Path
    dtype: str
    offset: int
    tokens: int

    @property
    def width(self) -> int:
        """Bytes per token."""
        return np.dtype(self.dtype).itemsize

    def probe(self) -> tuple[str, int]:
        """A digest that tells other contents without reading all of them, and the largest token that it met.

        The digest is of the number of tokens and of a few stretches, the first and the last tokens among them. A
        negative token counts as a very large one.
        """
        seen, largest = blake2b(f"{self.dtype} {self.tokens}".encode(), digest_size=16), 0
        count = min(PROBE // self.width, self.tokens)
        with open(self.path, "rb") as file:
            for start in np.linspace(0, self.tokens - count, PROBES).astype(np.int64).tolist():
                file.seek(self.offset + start * self.width)
                data = file.read(count * self.width)
                seen.update(data)
                largest = max(largest, int(np.frombuffer(data, f"<u{self.width}").max()))
        return seen.hexdigest(), largest


def look(path: Path, dtype: str = "uint16") -> Shard:
    """What a file holds, from its first bytes and its size; dtype: of the tokens where the file does not say it.

    Raises ValueError where it holds no tokens, other things than tokens, or fewer than it says.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(HEADER)
    except OSError as error:
        raise ValueError(f"the token file {path} cannot be read: {error.strerror}") from None
    if path.suffix == ".npy":
        shard = _npy(path)
    else:
        magic = int.from_bytes(head[:4], "little")
        if len(head) == HEADER and magic in LLM_C:
            shard = _llm_c(path, np.frombuffer(head, "<i4"))
        else:
            shard = Shard(path, dtype, 0, size // np.dtype(dtype).itemsize)
    expected = shard.offset + shard.tokens * shard.width
    if size != expected:
        raise ValueError(
            f"the token file {path} is cut short or is none: {shard.tokens:,} tokens of {shard.dtype} take "
            f"{expected:,} bytes, it has {size:,}. Copy it again, or give the type of its tokens (data.dtype)"
        )
    if not shard.tokens:
        raise ValueError(f"the token file {path} holds no tokens; remove it, or write it again")
    return shard


def _npy(path: Path) -> Shard:
    from numpy.lib import format as npy

    try:
        with open(path, "rb") as file:
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(file)]
            shape, _, dtype = read(file)
            offset = file.tell()
    except (ValueError, KeyError) as error:
        raise ValueError(f"the token file {path} must be a .npy array; {error}") from None
    if len(shape) != 1 or dtype.name not in DTYPES or dtype != dtype.newbyteorder("<"):
        raise ValueError(
            f"the token file {path} must be one row of integers ({', '.join(DTYPES)}, little-endian); it has the shape "
            f"{shape} of {dtype.str}"
        )
    return Shard(path, dtype.name, offset, shape[0])


def _llm_c(path: Path, header: np.ndarray) -> Shard:
    version, dtype = LLM_C[int(header[0])]
    if header[1] != version:
        raise ValueError(f"the token file {path} must be of version {version} of llm.c's format; it has {header[1]}")
    return Shard(path, dtype, HEADER, int(header[2]))


def beyond(shard: Shard, token: int, vocab: int) -> str:
    """The message for a token that there cannot be."""
    return (
        f"{shard.path} has the token {token}, which is beyond data.vocab={vocab}. Set the data.vocab of the tokenizer "
        "that made it, or data.dtype where the file does not say its type"
    )


class Descriptor:
    """An open file; closed with the last reference to it, so not while another thread reads from it."""

    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):  # what a shuffled order wants next is not what follows in the file
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Shards:
    """Stretches of many files, all of one type; vocab: what every token is less than. Safe in several threads."""

    def __init__(self, shards: Sequence[Shard], vocab: int):
        self.shards, self.vocab = list(shards), vocab
        self.dtype = np.dtype(self.shards[0].dtype).newbyteorder("<")
        other = next((shard for shard in self.shards if shard.dtype != self.shards[0].dtype), None)
        if other:
            first = self.shards[0]
            raise ValueError(
                f"the token files of a part must be of one type; {first.path} has {first.dtype}, {other.path} has "
                f"{other.dtype}. Write them again as one type, or leave some out"
            )
        self.tokens = np.array([shard.tokens for shard in self.shards], np.int64)
        paths = [shard.path for shard in self.shards]
        self._opened = lru_cache(maxsize=OPEN)(lambda number: Descriptor(paths[number]))

    def gather(self, owners: np.ndarray, starts: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both int64 (n, context), of the windows that start at the tokens `starts` of the shards
        `owners`; targets are the inputs one token later. Raises ValueError where a file has become shorter, or holds a
        token beyond the vocabulary, which a GPU would not name."""
        rows = np.empty((len(owners), context + 1), self.dtype)
        for row, owner, start in zip(rows, owners.tolist(), starts.tolist(), strict=True):
            shard, file = self.shards[owner], self._opened(owner)
            if os.preadv(file.number, [row.data], shard.offset + start * shard.width) != row.nbytes:
                raise ValueError(
                    f"the token file {shard.path} has become shorter since the start; restore it and resume"
                )
        largest = rows.view(f"<u{rows.itemsize}").max(1)  # seen without a sign, a negative token is a very large one
        if largest.max() >= self.vocab:
            row = int(largest.argmax())
            raise ValueError(beyond(self.shards[owners[row]], int(largest[row]), self.vocab))
        return torch.from_numpy(rows[:, :-1].astype(np.int64)), torch.from_numpy(rows[:, 1:].astype(np.int64))
