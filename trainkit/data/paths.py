"""The files that a path of the user's stands for: a file, a folder or a glob."""

from __future__ import annotations

import glob
import os
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path


def files_at(given: str, key: str = "data.path") -> list[tuple[str, Path]]:
    """The files, in the order of their names, which are relative to the folder given, or to what a glob begins with.

    A folder stands for all files below it, hidden ones left out. A relative path starts where the command is given.
    Raises ValueError, naming `key`, where there is nothing of that name, or a file cannot be read.
    """
    expanded = os.path.expanduser(given)
    root, paths = Path(expanded), [Path(expanded)]
    if root.is_dir():
        paths = [path for path in root.rglob("*") if not _hidden(path.relative_to(root))]
    elif root.is_file():
        root = root.parent
    elif glob.has_magic(expanded):
        root = Path(*takewhile(lambda part: not glob.has_magic(part), root.parts))
        paths = [Path(found) for found in glob.glob(expanded, recursive=True)]
    else:
        raise ValueError(f"{key} must be a file, a folder or a glob; {expanded} does not exist{_suggestion(root)}")
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths if path.is_file())
    closed = [path for _, path in files if not os.access(path, os.R_OK)]
    if closed:
        raise ValueError(f"{key}={given} must be readable; {closed[0]} is not. Change its permissions")
    return files


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _suggestion(missing: Path) -> str:
    """What stands in the nearest folder that does exist under a similar name."""
    while not missing.parent.is_dir():
        missing = missing.parent
    close = get_close_matches(missing.name, sorted(os.listdir(missing.parent)), n=1, cutoff=0.5)
    if close:
        return f". Did you mean {missing.parent / close[0]}?"
    return f", and there is nothing of a similar name in {missing.parent.resolve()}. A path starts at {Path.cwd()}"
