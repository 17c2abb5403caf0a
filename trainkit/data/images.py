"""Labelled images through Hugging Face `datasets`: a name on the hub, or a local folder in the same layout."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.pixels import Pixels, Split

log = logging.getLogger(__name__)

IMAGE_COLUMNS, LABEL_COLUMNS = ("img", "image"), ("label", "labels", "fine_label")


@dataclass(kw_only=True, eq=False, repr=False)
class Images(Pixels):
    """All images of one size, decoded once into memory.

    name: a data set on the hub (`uoft-cs/cifar10`) or a folder of `<split>-*.parquet` files, as the hub keeps them.
    field and label: the columns; null: the usual names. The splits are train, validation (or a tenth of train) and
    test (or validation). size: images are resized to so many pixels in both directions (bicubic); null: as they are.
    Raises ValueError where the data set cannot be had, has no such column, or sizes differ.
    """

    name: str
    field: str | None = None
    label: str | None = None
    size: int | None = None

    def read(self) -> dict[str, Split]:
        found = self._load()
        if "train" not in found:
            raise ValueError(f"data.name={self.name} needs a split 'train'; there are {', '.join(found)}")
        splits = {name: self._decode(found[name]) for name in found if name in ("train", "validation", "valid", "test")}
        train = splits["train"]
        val = splits.get("validation") or splits.get("valid")
        if val is None:
            # Every tenth image, so that the part is the same in every run and has every class.
            held = np.arange(len(train.labels)) % 10 == 9
            train, val = Split(*(a[~held] for a in train)), Split(*(a[held] for a in train))
        return {"train": train, "val": val, "test": splits.get("test") or val}

    def _load(self) -> Any:
        import datasets
        import pyarrow.parquet as parquet
        from datasets.table import InMemoryTable

        folder = Path(self.name).expanduser()
        if folder.is_dir():
            files: dict[str, list[Path]] = {}
            for path in sorted(folder.rglob("*.parquet")):
                files.setdefault(path.name.split("-")[0], []).append(path)
            if not files:
                raise ValueError(f"data.name={self.name} is a folder without .parquet files")
            # Read as they are: going through the library's own loader would copy them into the user's home first.
            tables = {k: [InMemoryTable(parquet.read_table(p)) for p in v] for k, v in files.items()}
            return {k: datasets.concatenate_datasets([datasets.Dataset(t) for t in v]) for k, v in tables.items()}
        try:
            return datasets.load_dataset(self.name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"data.name={self.name} is no local folder, and the hub cannot be reached or has no such data set "
                f"({str(error).splitlines()[0]}). Give a folder of .parquet files"
            ) from error

    def _decode(self, split: Any) -> Split:
        field = self._column(split, "field", self.field, IMAGE_COLUMNS)
        label = self._column(split, "label", self.label, LABEL_COLUMNS)
        log.info("data.name=%s: decoding %d images", self.name, len(split))
        arrays = [self._pixels(image) for image in split[field]]
        sizes = {array.shape for array in arrays}
        if len(sizes) > 1:
            raise ValueError(
                f"data.name={self.name} must hold images of one size; there are {sorted(sizes)[:3]} …. "
                "Try data.size=84, which resizes them"
            )
        images = np.stack(arrays)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        return Split(np.ascontiguousarray(images), np.asarray(split[label], dtype=np.int64))

    def _pixels(self, image: Any) -> np.ndarray:
        """A PIL image -> (height, width) or (height, width, 3)."""
        image = image if image.mode == "L" else image.convert("RGB")
        if self.size is not None:
            image = image.resize((self.size, self.size), resample=3)  # PIL.Image.Resampling.BICUBIC
        return np.asarray(image)

    def _column(self, split: Any, key: str, asked: str | None, usual: tuple[str, ...]) -> str:
        for name in (asked,) if asked else usual:
            if name in split.column_names:
                return name
        raise ValueError(
            f"data.{key}={asked or '|'.join(usual)}: no such column in data.name={self.name}; "
            f"there are {', '.join(split.column_names)}"
        )
