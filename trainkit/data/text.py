"""Text of the user's own: a file, a folder or a glob of UTF-8 text, .jsonl or .parquet."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from trainkit.data.documents import Document
from trainkit.data.paths import files_at
from trainkit.data.tokens import Tokens

ROWS = (".jsonl", ".parquet")


@dataclass(kw_only=True, eq=False, repr=False)
class Text(Tokens):
    """The files at `path`, in the order of their names; of .jsonl and .parquet, the column `field`, row by row.

    A folder stands for all files below it, hidden ones left out. A relative path starts where the command is given.
    The cache is renewed when a file's size or time of change differs. Raises ValueError where nothing is found, a file
    is not UTF-8 or a row lacks the field.
    """

    path: str
    field: str = "text"

    def fingerprint(self) -> list:
        stats = [(name, str(path.resolve()), path.stat()) for name, path in self.files()]
        return [self.field, [(name, path, stat.st_size, stat.st_mtime_ns) for name, path, stat in stats]]

    def size(self) -> int | None:
        files = self.files()
        compressed = any(path.suffix in ROWS for _, path in files)
        return None if compressed else sum(path.stat().st_size for _, path in files)

    def documents(self) -> Iterator[Document]:
        for name, path in self.files():
            if path.suffix == ".jsonl":
                yield from self._rows_of_jsonl(path)
            elif path.suffix == ".parquet":
                yield from self._rows_of_parquet(path)
            else:
                with open(path, "rb") as file:
                    yield Document(name.encode(), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def files(self) -> list[tuple[str, Path]]:
        """The files that are not empty, with the names that their part is drawn by."""
        files = [(name, path) for name, path in files_at(self.path) if path.stat().st_size]
        if not files:
            raise ValueError(f"data.path={self.path} must hold text; there is no file in it that is not empty")
        return files

    def _rows_of_jsonl(self, path: Path) -> Iterator[Document]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{path}:{number} must be a line of JSON; {error}") from None
                yield from row_document(row, self.field, f"{path}:{number}")

    def _rows_of_parquet(self, path: Path) -> Iterator[Document]:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            file = ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{path} must be a parquet file; {error}") from None
        columns = file.schema_arrow.names
        if self.field not in columns:
            raise ValueError(no_field(self.field, columns, str(path)))
        for batch in file.iter_batches(columns=[self.field], batch_size=1024):
            for text in batch.column(0).to_pylist():
                yield from row_document({self.field: text}, self.field, str(path))


def row_document(row: object, field: str, where: str) -> Iterator[Document]:
    """The document in a row, none where its text is null or empty. Raises ValueError where there is no such text."""
    if not isinstance(row, dict) or field not in row:
        raise ValueError(no_field(field, list(row) if isinstance(row, dict) else [], where))
    text = row[field]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"data.field={field} must hold text; {where} has {type(text).__name__} there")
    if text:
        data = text.encode(errors="replace")  # JSON can spell halves of surrogate pairs, UTF-8 cannot
        yield Document(data, data)


def no_field(field: str, columns: list[str], where: str) -> str:
    """The message for a row or table without the column asked for."""
    close = get_close_matches(field, columns, n=1) or columns[:1]
    remedy = f" Try data.field={close[0]}" if close else ""
    return f"data.field={field} must be a column of {where}; it has {', '.join(columns) or 'no columns'}.{remedy}"
