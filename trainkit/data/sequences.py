"""What all sources of token sequences share: keywords, what the text tells, and the loaders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule

from trainkit.data.loader import Batch, FixedLoader, GrowingLoader, Share, Source, TrainLoader, train_loader
from trainkit.data.tokenizer import Codec
from trainkit.data.windows import windows_per_epoch


@dataclass(kw_only=True, eq=False, repr=False)
class Sequences(LightningDataModule):
    """Batches (inputs, targets), both int64 (micro-batch, context); targets are the inputs one token later.

    batch_size: windows per optimizer step, over all processes and accumulated batches, so that a step sees the same
    windows on any number of either. Validation and test read a fixed set of val_batches · batch_size windows, spread
    evenly over their part of the text. `workers` are threads that draw batches ahead. vocab, bytes_per_token,
    unigram_entropy: what `facts` told when the run was started; None where it is the first start.

    A leaf says where the tokens are. Raises ValueError where they are too few for the batch size or the context, or are
    not those that the run was started with.
    """

    seed: int = 0
    batch_size: int = 32
    context: int = 128
    val_batches: int = 16
    test_batches: int = 32
    workers: int = 0
    vocab: int | None = None
    bytes_per_token: float | None = None
    unigram_entropy: float | None = None

    growing = False  # set by a callback that makes batches larger while the run goes on

    def __post_init__(self) -> None:
        super().__init__()
        for name in ("batch_size", "context", "val_batches", "test_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1; got {getattr(self, name)}")

    # --- what a leaf says -------------------------------------------------------------------------------------------

    def told(self) -> dict[str, Any]:
        """What only the text tells, by the names of keywords."""
        raise NotImplementedError

    def lengths(self) -> Mapping[str, list[int]]:
        """Tokens of each file of each part: train, val, test."""
        raise NotImplementedError

    def source(self) -> Source:
        """The training windows."""
        raise NotImplementedError

    def fixed(self, part: str, count: int) -> tuple[np.ndarray, Callable[[np.ndarray], Batch]]:
        """`count` windows, or as many as there are, spread evenly over a part; and what gives some of them."""
        raise NotImplementedError

    @property
    def codec(self) -> Codec:
        """The tokenizer of the text: encode(text), decode(tokens), vocab."""
        raise NotImplementedError

    def tokenizer_path(self) -> Path | None:
        """The tokenizer.json of the text; None where tokens are bytes."""
        raise NotImplementedError

    # --- what follows -----------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Finds the tokens, or makes them; idempotent, and safe in several processes at once."""
        self._check_lengths()

    def facts(self) -> dict[str, Any]:
        """What `told` says, compared with what it said when the run was started."""
        facts = self.told()
        for name, value in facts.items():
            known = getattr(self, name)
            if known is not None and not (
                isclose(known, value, rel_tol=1e-9) if type(value) is float else known == value
            ):
                raise ValueError(
                    f"the corpus differs from the one the run was started with: data.{name} was {known}, is {value}. "
                    "Restore the text, or start a new run"
                )
        return facts

    def setup(self, stage: str) -> None:
        self._check_lengths()
        self.share()

    def share(self) -> Share:
        """This process's part of a step. Raises ValueError where batch_size cannot be shared out evenly."""
        return Share.of(self.trainer, self.batch_size, self.workers)

    def train_dataloader(self) -> TrainLoader | GrowingLoader:
        return train_loader(self.source(), self.share(), seed=self.seed, trainer=self.trainer, growing=self.growing)

    def val_dataloader(self) -> FixedLoader:
        return self._fixed("val", self.val_batches)

    def test_dataloader(self) -> FixedLoader:
        return self._fixed("test", self.test_batches)

    def _fixed(self, part: str, batches: int) -> FixedLoader:
        share = self.share()
        items, draw = self.fixed(part, batches * self.batch_size)
        if len(items) < share.world:
            raise ValueError(
                f"every process needs a window of data.context={self.context} tokens of the {part} text; it has "
                f"{len(items)} for {share.world} processes. Give more text, or lower model.context or trainer.devices"
            )
        return FixedLoader(items, share, draw)

    def _check_lengths(self) -> None:
        lengths = self.lengths()
        for part, counts in lengths.items():
            if max(counts) <= self.context:
                raise ValueError(
                    f"data.context={self.context} needs at least {self.context + 1} tokens in each part of the text; "
                    f"{part} has {max(counts)}. Give more text or lower model.context"
                )
        windows = sum(windows_per_epoch(count, self.context) for count in lengths["train"])
        if windows < self.batch_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} needs as many windows of data.context={self.context} tokens; the "
                f"training text has {windows}. Lower data.batch_size or model.context, or give more text"
            )
