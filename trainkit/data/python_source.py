"""The source text of the running interpreter's own standard library: a corpus that every machine has."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from trainkit.data.documents import Document
from trainkit.data.tokens import Tokens

log = logging.getLogger(__name__)
# Tests are left out, and what has been installed beside the library.
SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(kw_only=True, eq=False, repr=False)
class PythonSource(Tokens):
    """All .py files of the standard library without its test packages, in the order of their relative paths.

    About 10 MB; the bytes differ a little between Python versions, so figures compare within one version. Raises
    ValueError where the interpreter comes without source files.
    """

    def fingerprint(self) -> list:
        contents = [(name, blake2b(text).hexdigest()) for name, text in self._files()]
        return [list(sys.version_info[:3]), contents]

    def documents(self) -> Iterator[Document]:
        undecodable = 0
        for name, text in self._files():
            try:
                text.decode()
            except UnicodeDecodeError:
                undecodable += 1
                continue
            yield Document(name.encode(), text)
        if undecodable:
            log.info("data=python_source leaves out %d files that are not UTF-8", undecodable)

    def size(self) -> int:
        return sum(len(text) for _, text in self._files())

    def _files(self) -> Iterator[tuple[str, bytes]]:
        root = Path(sysconfig.get_path("stdlib"))
        paths = []
        for folder, inner, names in os.walk(root):
            inner[:] = [name for name in inner if name not in SKIPPED]
            found = (Path(folder, name) for name in names if name.endswith(".py"))
            paths += [path for path in found if path.is_file()]
        if not paths:
            raise ValueError(f"data=python_source needs the library's .py files; {root} has none. Try data=text")
        for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
            yield name, path.read_bytes()
