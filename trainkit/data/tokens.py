"""What the sources of text share: a tokenizer, and a corpus in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainkit.data.corpus import Corpus, key, prepare
from trainkit.data.documents import Document
from trainkit.data.encoding import write
from trainkit.data.loader import Batch
from trainkit.data.sequences import Sequences
from trainkit.data.tokenizer import FILE, Codec, codec_fingerprint, load_codec, make_codec
from trainkit.data.windows import Windows, gather, spread


@dataclass(kw_only=True, eq=False, repr=False)
class Tokens(Sequences):
    """Sequences of a text that is encoded once, into the cache.

    A source gives its documents, and says in a fingerprint what they depend on.
    """

    cache_dir: str
    tokenizer: Literal["byte", "bpe", "file"] = "byte"
    tokenizer_vocab: int = 4096
    tokenizer_file: str | None = None

    def fingerprint(self) -> Any:
        """What the documents depend on, as plain values: equal fingerprints mean equal documents."""
        raise NotImplementedError

    def documents(self) -> Iterable[Document]:
        """The text, from its beginning at every call."""
        raise NotImplementedError

    def size(self) -> int | None:
        """How many bytes the documents have; None where that is not known in advance."""
        return None

    @cached_property
    def corpus(self) -> Corpus:
        """The corpus in the cache, built if need be."""
        return self._prepared()

    @property
    def codec(self) -> Codec:
        return load_codec(self.corpus.folder)

    def tokenizer_path(self) -> Path | None:
        return None if self.tokenizer == "byte" else self.corpus.folder / FILE

    def told(self) -> dict[str, Any]:
        """vocab, and bytes_per_token and unigram_entropy (nats) of the validation part."""
        return {name: getattr(self.corpus, name) for name in ("vocab", "bytes_per_token", "unigram_entropy")}

    def lengths(self) -> dict[str, list[int]]:
        return {part: [count] for part, count in self.corpus.tokens.items()}

    def source(self) -> Windows:
        return Windows(self.corpus.open("train"), self.context)

    def fixed(self, part: str, count: int) -> tuple[np.ndarray, Callable[[np.ndarray], Batch]]:
        tokens = self.corpus.open(part)
        return spread(len(tokens), self.context, count), lambda mine: gather(tokens, mine, self.context)

    @property
    def source_name(self) -> str:
        """The word behind data= on the command line."""
        return type(self).__module__.rpartition(".")[2]

    def tokenizer_settings(self) -> dict[str, Any]:
        """What codec_fingerprint and make_codec are told."""
        return {"kind": self.tokenizer, "vocab": self.tokenizer_vocab, "file": self.tokenizer_file}

    def _prepared(self) -> Corpus:
        settings, source = self.tokenizer_settings(), self.source_name
        name = f"{source}-{key(self.fingerprint(), codec_fingerprint(**settings))}"
        build = partial(
            write,
            documents=self.documents,
            label=f"data={source}",
            size=self.size,
            make_codec=partial(make_codec, **settings),
        )
        return prepare(Path(self.cache_dir).expanduser() / "corpora" / name, build)
