"""A text data set of the Hugging Face hub, or a local folder in the same layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from trainkit.data.documents import Document, drawn
from trainkit.data.text import row_document
from trainkit.data.tokens import Tokens

# What data sets call their splits, in the order of preference.
NAMES = {"val": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(kw_only=True, eq=False, repr=False)
class Hub(Tokens):
    """The column `field` of the data set `name`, read row by row as it is downloaded.

    Training reads `split`, of which `max_documents` rows at most. The data set's own validation and test splits are
    used; one that it lacks is drawn from `split` by a hash of the row. `config` is the hub's word for a variant of a
    data set; `revision` pins a commit or branch, and without it the cache keeps what was newest when it was made.
    A folder has files such as data/train-00000-of-00001.parquet, .jsonl or .arrow, or what `save_to_disk` wrote.
    Raises ValueError where the data set cannot be reached or has no such variant, split or column.
    """

    name: str = dataclasses.field()  # required: LightningDataModule has an attribute of this name
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    field: str = "text"
    max_documents: int | None = None

    def fingerprint(self) -> list:
        choice = [self.config, self.revision, self.split, self.field, self.max_documents]
        folder = self._folder()
        if folder is None:
            return [self.name, *choice]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return [stats, *choice]

    def documents(self) -> Iterator[Document]:
        splits = self._splits()
        if self.split not in splits:
            raise ValueError(
                f"data.split={self.split} must be a split of data.name={self.name}; it has {', '.join(splits)}"
            )
        own = {part: next((n for n in names if n in splits and n != self.split), None) for part, names in NAMES.items()}
        for part, split in own.items():
            if split:
                yield from self._rows(splits[split], split, part)
        rows = islice(self._rows(splits[self.split], self.split, None), self.max_documents)
        if not any(own.values()):
            yield from rows
            return
        for row in rows:
            part = drawn(row.key)
            yield row._replace(part="train" if own.get(part) else part)

    def _rows(self, rows: Any, split: str, part: str | None) -> Iterator[Document]:
        for row in rows:
            for document in row_document(row, self.field, f"{self.name}, split {split}"):
                yield document._replace(part=part)

    def _folder(self) -> Path | None:
        folder = Path(self.name).expanduser()
        return folder if folder.is_dir() else None

    def _splits(self) -> dict[str, Any]:
        """Every split as an iterable of rows: streamed; from the hub's own cache where the hub cannot be reached."""
        from datasets import DownloadConfig, load_dataset, load_from_disk

        name, saved = str(self._folder() or self.name), ("state.json", "dataset_dict.json")
        choice: dict[str, Any] = {"name": self.config, "revision": self.revision}
        try:
            if any(Path(name, file).is_file() for file in saved):
                loaded: Any = load_from_disk(name)
                return dict(loaded) if isinstance(loaded, dict) else {self.split: loaded}
            try:
                return dict(load_dataset(name, **choice, streaming=True))
            except ConnectionError:  # local files only: a hub that comes back must not start a download of everything
                return dict(load_dataset(name, **choice, download_config=DownloadConfig(local_files_only=True)))
        except (OSError, ValueError, RuntimeError) as error:
            fact = str(error).strip().split("\n")[0].rstrip(".")
            raise ValueError(
                f"data.name={self.name} must be a folder, or a data set of the hub that can be reached or is cached; "
                f"{fact}. Check the name, data.config and the network, or give a local folder"
            ) from None
