"""The data module that all image sources share: everything decoded once into memory, batches by position alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F

from trainkit.data.loader import FixedLoader, GrowingLoader, Share, TrainLoader, train_loader


class Split(NamedTuple):
    """images: uint8 (N, channels, height, width); labels: int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(kw_only=True, eq=False, repr=False)
class Pixels(LightningDataModule):
    """Batches (images, labels): float32 (B, C, H, W), standardized per channel by the training set, and int64 (B,).

    `batch_size` counts images per optimizer step over all processes and accumulated batches. augment="crop_flip" is the
    usual treatment of small training images: zero-padding by `pad` pixels, a random crop of the old size, a random
    mirror image. `workers` are threads that draw batches ahead. The last two keywords are what facts() told when the
    run was started; null: not yet known. A source gives its splits (`read`). Raises ValueError where there are fewer
    images than a batch, or other ones than the run was started with.
    """

    seed: int = 0
    batch_size: int = 128
    augment: Literal["none", "crop_flip"] = "none"
    pad: int = 4
    workers: int = 0
    image: list[int] | None = None
    classes: int | None = None

    growing = False  # set by a callback that makes batches larger while the run goes on

    def __post_init__(self) -> None:
        super().__init__()
        if self.batch_size < 1:
            raise ValueError(f"data.batch_size must be at least 1; got {self.batch_size}")
        if self.augment not in ("none", "crop_flip"):
            raise ValueError(f"data.augment is none or crop_flip; got {self.augment!r}")
        self.splits: dict[str, Split] = {}

    def read(self) -> dict[str, Split]:
        """The splits "train", "val" and "test"."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        if not self.splits:
            self.splits = self.read()
            count = len(self.splits["train"].labels)
            if count < self.batch_size:
                raise ValueError(
                    f"data.batch_size={self.batch_size} is more than the {count} training images; lower it"
                )
            pixels = self.splits["train"].images.astype(np.float64) / 255
            self.mean = pixels.mean((0, 2, 3), keepdims=True)
            self.std = np.maximum(pixels.std((0, 2, 3), keepdims=True), 1e-6)

    def facts(self) -> dict[str, int | list[int]]:
        """What only reading the data tells: image, [channels, height, width], and classes."""
        train = self.splits["train"]
        facts = {"image": list(train.images.shape[1:]), "classes": int(train.labels.max()) + 1}
        for name, value in facts.items():
            known = getattr(self, name)
            if known is not None and list(np.atleast_1d(known)) != list(np.atleast_1d(value)):
                raise ValueError(
                    f"the images differ from the ones the run was started with: data.{name} was {known}, is {value}. "
                    "Restore them, or start a new run"
                )
        return facts

    def setup(self, stage: str) -> None:
        self.share()

    def share(self) -> Share:
        """This process's part of a step. Raises ValueError where batch_size cannot be shared out evenly."""
        return Share.of(self.trainer, self.batch_size, self.workers)

    def train_dataloader(self) -> TrainLoader | GrowingLoader:
        return train_loader(Shuffled(self), self.share(), seed=self.seed, trainer=self.trainer, growing=self.growing)

    def val_dataloader(self) -> FixedLoader:
        return self._all("val")

    def test_dataloader(self) -> FixedLoader:
        return self._all("test")

    def _all(self, name: str) -> FixedLoader:
        split = self.splits[name]
        return FixedLoader(np.arange(len(split.labels)), self.share(), lambda items: self.batch(split, items))

    def batch(self, split: Split, items: np.ndarray) -> tuple[Tensor, Tensor]:
        """The images and labels at these positions, standardized."""
        images = (split.images[items] / 255.0 - self.mean) / self.std
        return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(split.labels[items])


class Shuffled:
    """The training images in an order, and with changes, that follow from (seed, epoch) alone."""

    def __init__(self, data: Pixels):
        self.data, self.split = data, data.splits["train"]

    def __len__(self) -> int:
        return len(self.split.labels)

    def epoch(self, seed: int, epoch: int) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """What gives the batch at a stretch of this epoch's order."""
        count = len(self)
        bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
        order = np.argsort(bits.random_raw(count), kind="stable")
        if self.data.augment == "none":
            return lambda part: self.data.batch(self.split, order[part])
        # Drawn for the whole epoch, so that an image's change does not depend on how the epoch is shared out.
        shifts = (bits.random_raw((2, count)) % np.uint64(2 * self.data.pad + 1)).astype(np.int64)
        mirrored = torch.from_numpy(bits.random_raw(count) % np.uint64(2) == 1)

        def draw(part: slice) -> tuple[Tensor, Tensor]:
            images, labels = self.data.batch(self.split, order[part])
            images = crop(images, self.data.pad, *shifts[:, part])
            return torch.where(mirrored[part, None, None, None], images.flip(-1), images), labels

        return draw


def crop(images: Tensor, pad: int, down: np.ndarray, right: np.ndarray) -> Tensor:
    """The window of each image's own size that starts at (down, right) of the image padded by `pad` zeros."""
    count, _, height, width = images.shape
    padded = F.pad(images, (pad,) * 4)
    rows = torch.from_numpy(down)[:, None, None] + torch.arange(height)[:, None]  # (B, H, 1)
    columns = torch.from_numpy(right)[:, None, None] + torch.arange(width)  # (B, 1, W)
    return padded[torch.arange(count)[:, None, None], :, rows, columns].movedim(-1, 1)
