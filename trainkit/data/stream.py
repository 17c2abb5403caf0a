"""Tokens in many files, for a text that is larger than memory or that others have encoded: read as training goes on.

The files are read in place, from a local disk or one that all hosts share, in an order over all of them that follows
from the seed and the epoch alone. So the position is the optimizer step, and the batches are the same on any number of
processes, hosts and threads. That is why no engine for streaming does the reading (litdata, Mosaic's streaming): in
those, which windows make a step depends on the number of processes and workers, each of which keeps a position of its
own, and litdata also brings torchvision, boto3 and obstore.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from trainkit.data.loader import Batch
from trainkit.data.sequences import Sequences
from trainkit.data.shard_index import Collection, collect
from trainkit.data.shard_windows import ShardWindows, spread_over
from trainkit.data.tokenizer import FILE, Bytes, Codec, Subwords

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False, repr=False)
class TokenStream(Sequences):
    """The token files at `path`: a folder that `python -m trainkit.data shards` wrote, or .npy and .bin of others.

    Of the former everything is known. Of the latter, `vocab` has to be given, `dtype` where a file does not say it
    (null: uint16, or uint32 for a vocabulary beyond), `val_path` where no name has val in it, `tokenizer_file` to write
    text, bytes_per_token to tell bits per byte. A larger `vocab` than the text needs makes a larger model. fingerprint:
    what `facts` told when the run was started, as a run goes on with the very same files. Raises ValueError for what
    trainkit.data.shard_index does not accept.
    """

    path: str
    val_path: str | None = None
    dtype: str | None = None
    tokenizer_file: str | None = None
    fingerprint: str | None = None

    @cached_property
    def collection(self) -> Collection:
        found = collect(self.path, val_path=self.val_path, dtype=self.dtype, vocab=self.vocab)
        needed = found.about.get("vocab", 1)
        if self.vocab is not None and self.vocab < needed:
            raise ValueError(f"data.vocab={self.vocab} is less than the {needed} tokens of the text; leave it out")
        return found

    def prepare_data(self) -> None:
        super().prepare_data()
        for part, counts in self.lengths().items():
            short = sum(count <= self.context for count in counts)
            if short:
                log.info("%d %s files have no more than data.context=%d tokens: left out", short, part, self.context)

    def told(self) -> dict[str, Any]:
        about = self.collection.about
        told = {"vocab": self.vocab or about["vocab"], "fingerprint": self.collection.fingerprint}
        return told | {name: about[name] for name in ("bytes_per_token", "unigram_entropy") if name in about}

    def lengths(self) -> dict[str, list[int]]:
        return {part: shards.tokens.tolist() for part, shards in self.collection.parts.items()}

    def source(self) -> ShardWindows:
        return ShardWindows(self.collection.parts["train"], self.context)

    def fixed(self, part: str, count: int) -> tuple[np.ndarray, Callable[[np.ndarray], Batch]]:
        return spread_over(self.collection.parts[part], self.context, count)

    @property
    def codec(self) -> Codec:
        path = self.tokenizer_path()
        return Bytes() if path is None else Subwords(path)

    def tokenizer_path(self) -> Path | None:
        kind = self.collection.about.get("tokenizer")
        if kind is None and self.tokenizer_file is None:
            raise ValueError(
                f"which tokenizer made the files at {self.path} is not known; name its tokenizer.json by "
                "data.tokenizer_file"
            )
        if kind is None:
            return Path(str(self.tokenizer_file)).expanduser()
        return None if kind == "byte" or self.collection.folder is None else self.collection.folder / FILE
