"""A sharded checkpoint: trainer=fsdp trainer.checkpoint=sharded.

    last.ckpt                            what every checkpoint is, with a place where a sharded tensor would stand
    shards/00000300_1f3a6b2c/0.ckpt, …   the rows of each of those tensors that a process holds: a file per process

Every process writes its own file, and then rank 0 the one that names them, which so is the whole checkpoint's seal:
replacing, linking and removing it is done as with any other. Who reads one gets whole tensors, or the rows that are
asked for, by memory mapping. Not torch.distributed.checkpoint, whose index is a pickle and could be a program.
"""

from __future__ import annotations

import errno
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, distributed

from trainkit.data.sync import sync

FOLDER = "shards"
SEAL = "shards"  # the key of a checkpoint under which it names its files
SEEN = 30.0  # seconds until what another machine has written must be seen
UNREADABLE = (OSError, RuntimeError, EOFError, TypeError, ValueError, UnpicklingError)
_TAG = re.compile(r"\d{8,}_[0-9a-f]{8}")


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor cut along its first axis: the rows of every process in order, each (rows, …) or empty."""

    shape: torch.Size
    parts: tuple[Tensor, ...]

    def rows(self, first: int, count: int) -> Tensor:
        """Rows first to first + count, (count, …)."""
        found, start = [], 0
        for part in self.parts:
            low, high = max(first, start), min(first + count, start + len(part))
            if low < high:
                found.append(part[low - start : high - start])
            start += len(part)
        if not found:
            return self.parts[0].new_empty((0, *self.shape[1:]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def copy_to(self, target: Tensor) -> None:
        """Row by row, so that the whole is nowhere held twice."""
        start = 0
        for part in self.parts:
            target[start : start + len(part)].copy_(part)
            start += len(part)

    def whole(self) -> Tensor:
        """In memory of its own."""
        return torch.cat(self.parts)


def place(key: str, shape: torch.Size) -> dict[str, Any]:
    """What stands in a checkpoint for a tensor of which each process keeps its rows as `key`."""
    return {"shard": key, "shape": list(shape)}


def new_tag(step: int) -> str:
    return f"{step:08d}_{secrets.token_hex(4)}"


def file_of(checkpoint: Path, tag: str, rank: int) -> Path:
    return checkpoint.parent / FOLDER / tag / f"{rank}.ckpt"


def files(checkpoint: Path) -> list[Path]:
    """The further files that a sound checkpoint names; those of what is none are found out when it is read."""
    try:
        return _named(torch.load(checkpoint, mmap=True, map_location="cpu", weights_only=True), checkpoint)
    except UNREADABLE:
        return []


def write(mine: dict[str, Tensor], checkpoint: Path, step: int, save: Callable[[Any, Path], None]) -> dict[str, Any]:
    """Writes the rows that every process holds, by `save`; returns what the checkpoint is to say of them.

    All processes call it, and each raises the OSError that one of them met; nothing is left then.
    """
    tag = [new_tag(step)]
    distributed.broadcast_object_list(tag, 0)
    paths = [file_of(checkpoint, tag[0], rank) for rank in range(distributed.get_world_size())]
    first = distributed.get_rank() == 0
    try:
        _together(lambda: _save(mine, paths[distributed.get_rank()], save))
        _together(lambda: _find(paths) if first else None)
    except OSError:
        if first:
            shutil.rmtree(paths[0].parent, ignore_errors=True)
        raise
    return {"tag": tag[0], "count": len(paths)}


def read(path: Path, *, lazily: bool = False) -> Any:
    """A checkpoint on the CPU, mapped and not read, in whole tensors; lazily: ShardedTensors for those that were cut.

    Raises what torch.load does, for a further file too, and ValueError where the files do not belong together.
    """
    return filled(torch.load(path, mmap=True, map_location="cpu", weights_only=True), path, lazily=lazily)


def filled(loaded: Any, path: Path, *, lazily: bool = False) -> Any:
    """The same of what torch.load has found in the file."""
    parts = [torch.load(file, mmap=True, map_location="cpu", weights_only=True) for file in _named(loaded, path)]
    return _filled(loaded, parts, lazily) if parts else loaded


def whole(value: Any) -> Any:
    """The same with whole tensors in the places of ShardedTensor."""
    if isinstance(value, ShardedTensor):
        return value.whole()
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    return value


def clear(folder: Path) -> None:
    """Removes shards in a folder of checkpoints that none of these names any more.

    Nothing where one of them cannot be read: what it names may be sound, and it readable tomorrow.
    """
    if not (folder / FOLDER).is_dir():
        return
    try:
        loaded = {
            path: torch.load(path, mmap=True, map_location="cpu", weights_only=True) for path in folder.glob("*.ckpt")
        }
        used = {file.parent.name for path, one in loaded.items() for file in _named(one, path)}
    except UNREADABLE:
        return
    for tag in (folder / FOLDER).iterdir():
        if tag.name not in used:
            shutil.rmtree(tag, ignore_errors=True)


def _named(loaded: Any, path: Path) -> list[Path]:
    seal = loaded.get(SEAL) if isinstance(loaded, dict) else None
    if seal is None:
        return []
    if not isinstance(seal, dict) or not _TAG.fullmatch(str(seal.get("tag"))) or not isinstance(seal.get("count"), int):
        raise ValueError(f"{path} does not say where its shards are")
    return [file_of(path, seal["tag"], rank) for rank in range(seal["count"])]


def _filled(value: Any, parts: list[dict[str, Tensor]], lazily: bool) -> Any:
    if isinstance(value, dict) and value.keys() == {"shard", "shape"}:
        pieces = ShardedTensor(torch.Size(value["shape"]), tuple(part[value["shard"]] for part in parts))
        if sum(len(part) for part in pieces.parts) != pieces.shape[0]:
            raise ValueError(f"the shards of {value['shard']} are not all of it")
        return pieces if lazily else pieces.whole()
    if isinstance(value, dict):
        return {key: _filled(inner, parts, lazily) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, parts, lazily) for inner in value]
    return value


def _save(mine: dict[str, Tensor], path: Path, save: Callable[[Any, Path], None]) -> None:
    save(mine, path)
    for written in (path, path.parent, path.parent.parent):  # a name is only there once its folder is
        sync(written)


def _find(paths: Sequence[Path]) -> None:
    """Raises OSError where this process does not see what others wrote; a network's file system may take a while."""
    deadline = time.monotonic() + SEEN
    while missing := [path for path in paths if not path.is_file()]:
        if time.monotonic() > deadline:
            why = "trainer.checkpoint=sharded needs a folder that all machines share; rank 0 does not see"
            raise FileNotFoundError(errno.ENOENT, why, str(missing[0]))
        time.sleep(0.1)


def _together(act: Callable[[], None]) -> None:
    """Calls `act` on every process; where it fails on one it has failed on all."""
    failed: OSError | None = None
    try:
        act()
    except OSError as error:
        failed = error
    mine = None if failed is None else (failed.errno, failed.strerror, failed.filename)
    everyone: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(everyone, mine)
    if first := next(filter(None, everyone), None):
        raise failed or OSError(*first)
