"""A run's checkpoints on disk: what they are called, which of them is the newest sound one. Imports no torch."""

from __future__ import annotations

import re
import zipfile
import zlib
from pathlib import Path

from trainkit.launch.explain import UserError


def kept(folder: Path, keep: int) -> list[Path]:
    """The places of the last `keep` checkpoints, newest first: last.ckpt, previous.ckpt, previous_2.ckpt, …"""
    return [folder / ("last.ckpt" if n == 0 else f"previous{f'_{n}' if n > 1 else ''}.ckpt") for n in range(keep)]


def found(folder: Path) -> list[Path]:
    """The checkpoints that a run could go on from, in the order in which they should be tried."""
    older = {_age(path): path for path in folder.glob("previous*.ckpt") if _age(path)}
    paths = [folder / "last.ckpt", *(older[age] for age in sorted(older)), folder / "best.ckpt"]
    return [path for path in paths if path.is_file()]


def _age(path: Path) -> int:
    match = re.fullmatch(r"previous(?:_(\d+))?\.ckpt", path.name)
    return int(match[1] or 1) if match else 0


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file, or None.

    torch.save writes a zip archive, which holds a CRC-32 of every tensor and of the rest, and torch.load does not look
    at them. So a file carries its checksums itself, whoever copies it, and those that older versions wrote do too.
    Of a sharded checkpoint all files are looked at.
    """
    wrong = _damage(path)
    if wrong is not None:
        return wrong
    from trainkit.launch.sharded_checkpoint import files  # which needs torch

    found = ((file, _damage(file)) for file in files(path))
    return next((f"its shard {file.relative_to(path.parent)} is {why}" for file, why in found if why is not None), None)


def _damage(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
            return None if bad is None else f"{bad} does not match its checksum"
    # What zipfile raises for bytes that make no sense depends on where they stand.
    except (OSError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, ValueError, EOFError) as error:
        return "truncated or overwritten" if not isinstance(error, OSError) else error.strerror or str(error)


def newest(directory: Path) -> tuple[Path | None, list[str]]:
    """The newest sound checkpoint of a run, None where it has none at all; a line on each newer one that is damaged.

    Raises UserError where all are damaged.
    """
    said: list[str] = []
    paths = found(directory / "checkpoints")
    for path in paths:
        wrong = damage(path)
        if wrong is None:
            return path, [f"{line}; going on from {path.name}, which is sound" for line in said]
        said.append(f"warning: {path} cannot be read: {wrong}")
    if not paths:
        return None, []
    raise UserError(
        f"no checkpoint of {str(directory)!r} can be read: {', '.join(path.name for path in paths)} are damaged",
        f"put back a copy of last.ckpt, or start anew with the overrides in {directory / 'result.json'}",
    )
