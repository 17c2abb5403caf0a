"""What all text sources share: keywords, a corpus in the cache, and the loaders over it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import isclose
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule

from trainkit.data.corpus import Corpus, key, prepare
from trainkit.data.documents import Document
from trainkit.data.encoding import write
from trainkit.data.loader import FixedLoader, GrowingLoader, Share, TrainLoader, train_loader
from trainkit.data.tokenizer import Codec, codec_fingerprint, load_codec, make_codec
from trainkit.data.windows import Windows, gather, spread, windows_per_epoch


@dataclass(kw_only=True, eq=False, repr=False)
class Tokens(LightningDataModule):
    """Batches (inputs, targets), both int64 (micro-batch, context); targets are the inputs one token later.

    batch_size: windows per optimizer step, over all processes and accumulated batches, so that a step sees the same
    windows on any number of either. Validation and test read a fixed set of val_batches · batch_size windows, spread
    evenly over their part of the text. `workers` are threads that draw batches ahead. vocab, bytes_per_token,
    unigram_entropy: what `facts` told when the run was started; None where it is the first start.

    A source gives its documents, and says in a fingerprint what they depend on. Raises ValueError where the text is
    too short for the batch size or the context, or is not the one that the run was started with.
    """

    cache_dir: str
    seed: int = 0
    batch_size: int = 32
    context: int = 128
    tokenizer: Literal["byte", "bpe", "file"] = "byte"
    tokenizer_vocab: int = 4096
    tokenizer_file: str | None = None
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
        self._corpus: Corpus | None = None

    def fingerprint(self) -> Any:
        """What the documents depend on, as plain values: equal fingerprints mean equal documents."""
        raise NotImplementedError

    def documents(self) -> Iterable[Document]:
        """The text, from its beginning at every call."""
        raise NotImplementedError

    def size(self) -> int | None:
        """How many bytes the documents have; None where that is not known in advance."""
        return None

    @property
    def corpus(self) -> Corpus:
        """The corpus in the cache, built if need be."""
        if self._corpus is None:
            self._corpus = self._prepared()
        return self._corpus

    @property
    def codec(self) -> Codec:
        """The tokenizer of the corpus: encode(text), decode(tokens), vocab."""
        return load_codec(self.corpus.folder)

    def prepare_data(self) -> None:
        """Finds the corpus or builds it; idempotent, and safe in several processes at once."""
        self._check_lengths(self.corpus)

    def facts(self) -> dict[str, int | float]:
        """What only the text tells: vocab, and bytes_per_token and unigram_entropy (nats) of its validation part."""
        facts = {name: getattr(self.corpus, name) for name in ("vocab", "bytes_per_token", "unigram_entropy")}
        for name, value in facts.items():
            known = getattr(self, name)
            if known is not None and not isclose(known, value, rel_tol=1e-9):
                raise ValueError(
                    f"the corpus differs from the one the run was started with: data.{name} was {known}, is {value}. "
                    "Restore the text, or start a new run"
                )
        return facts

    def setup(self, stage: str) -> None:
        self._check_lengths(self.corpus)
        self.share()

    def share(self) -> Share:
        """This process's part of a step. Raises ValueError where batch_size cannot be shared out evenly."""
        return Share.of(self.trainer, self.batch_size, self.workers)

    def train_dataloader(self) -> TrainLoader | GrowingLoader:
        windows = Windows(self.corpus.open("train"), self.context)
        return train_loader(windows, self.share(), seed=self.seed, trainer=self.trainer, growing=self.growing)

    def val_dataloader(self) -> FixedLoader:
        return self._fixed("val", self.val_batches)

    def test_dataloader(self) -> FixedLoader:
        return self._fixed("test", self.test_batches)

    def _fixed(self, part: str, batches: int) -> FixedLoader:
        tokens, share = self.corpus.open(part), self.share()
        starts = spread(len(tokens), self.context, batches * self.batch_size)
        if len(starts) < share.world:
            raise ValueError(
                f"every process needs a window of data.context={self.context} tokens of the {part} text; it has "
                f"{len(starts)} for {share.world} processes. Give more text, or lower model.context or trainer.devices"
            )
        return FixedLoader(starts, share, lambda mine: gather(tokens, mine, self.context))

    def _prepared(self) -> Corpus:
        settings = {"kind": self.tokenizer, "vocab": self.tokenizer_vocab, "file": self.tokenizer_file}
        source = type(self).__module__.rpartition(".")[2]
        name = f"{source}-{key(self.fingerprint(), codec_fingerprint(**settings))}"
        build = partial(
            write,
            documents=self.documents,
            label=f"data={source}",
            size=self.size,
            make_codec=partial(make_codec, **settings),
        )
        return prepare(Path(self.cache_dir).expanduser() / "corpora" / name, build)

    def _check_lengths(self, corpus: Corpus) -> None:
        for part, count in corpus.tokens.items():
            if count <= self.context:
                raise ValueError(
                    f"data.context={self.context} needs at least {self.context + 1} tokens in each part of the text; "
                    f"{part} has {count}. Give more text or lower model.context"
                )
        windows = windows_per_epoch(corpus.tokens["train"], self.context)
        if windows < self.batch_size:
            raise ValueError(
                f"data.batch_size={self.batch_size} needs as many windows of data.context={self.context} tokens; the "
                f"training text has {windows}. Lower data.batch_size or model.context, or give more text"
            )
