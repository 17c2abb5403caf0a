"""Text to tokens and back: bytes as they are, or subwords (a byte-level BPE of our own, or any tokenizer.json).

A corpus is one long row of tokens; every document in it ends with the tokenizer's separator.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger(__name__)

END = "<|endoftext|>"
# What published tokenizers call the end of a document, in the order of preference.
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[SEP]")
FILE = "tokenizer.json"  # its name in a prepared corpus
KINDS = ("byte", "bpe", "file")
LEARN_FROM = 1 << 26  # bytes of training text that a BPE vocabulary is learnt from: more moves it little


class Codec(Protocol):
    """vocab: how many tokens there are; separator: the tokens that end a document; unknown: what it has none for."""

    vocab: int
    separator: list[int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: list[int]) -> str: ...
    def encode_many(self, texts: list[bytes]) -> list[np.ndarray]: ...
    def unknown(self, text: str) -> list[str]: ...


class Bytes:
    """Token = byte of the UTF-8 text; the separator is the byte 0."""

    def __init__(self) -> None:
        self.vocab, self.separator = 256, [0]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def encode_many(self, texts: list[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(text, np.uint8) for text in texts]

    def unknown(self, text: str) -> list[str]:
        return []


class Subwords:
    """A tokenizer.json of Hugging Face's `tokenizers`; its own threads encode many texts at once.

    Text that spells a special token is encoded as text, and no special tokens are added, so nothing but the end of a
    document can look like one. Where the file knows no end-of-text token, a blank line separates documents.
    """

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"data.tokenizer_file must be a tokenizer.json; {path} is none ({error})") from None
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        known = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab = max(known.values()) + 1
        end = next((known[name] for name in ENDS if name in known), None)
        self.separator = self.encode("\n\n") if end is None else [end]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=False)

    def encode_many(self, texts: list[bytes]) -> list[np.ndarray]:
        encoded = self.tokenizer.encode_batch_fast([text.decode() for text in texts], add_special_tokens=False)
        return [np.array(one.ids, np.uint32) for one in encoded]

    def unknown(self, text: str) -> list[str]:
        """The parts of a text that would be replaced by the token for unknown ones, or left out."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        spare = getattr(self.tokenizer.model, "unk_token", None)
        spans = list(zip(encoding.tokens, encoding.offsets, strict=True))
        replaced = [text[start:end] for token, (start, end) in spans if token == spare]
        covered = {at for start, end in encoding.offsets for at in range(start, end)}
        dropped = [letter for at, letter in enumerate(text) if at not in covered and not letter.isspace()]
        return list(dict.fromkeys(replaced + dropped))


def codec_fingerprint(kind: str, *, vocab: int, file: str | None) -> list:
    """What the tokens depend on apart from the text. Raises ValueError for settings that do not go together."""
    if (file is None) == (kind == "file"):
        raise ValueError(
            "data.tokenizer=file needs data.tokenizer_file=PATH of a tokenizer.json"
            if file is None
            else f"data.tokenizer_file is read by data.tokenizer=file alone; got data.tokenizer={kind}"
        )
    if kind not in KINDS:
        raise ValueError(f"data.tokenizer is one of {', '.join(KINDS)}; got {kind!r}")
    if kind == "bpe" and vocab < 257:
        raise ValueError(f"data.tokenizer_vocab must be at least 257 (256 bytes and {END}); got {vocab}")
    if file is None:
        return [kind, vocab if kind == "bpe" else None]
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(f"data.tokenizer_file must be a tokenizer.json; {path} is no file")
    return [kind, blake2b(path.read_bytes()).hexdigest()]


def make_codec(folder: Path, texts: Iterable[bytes], *, kind: str, vocab: int, file: str | None) -> Codec:
    """The codec of a corpus that is being prepared in `folder`, learnt from the training `texts` where it is to be."""
    if kind == "bpe":
        log.info("learning %d tokens from the training text", vocab)
        _learn(_head(texts), vocab).save(str(folder / FILE))
    if kind == "file":
        shutil.copyfile(Path(str(file)).expanduser(), folder / FILE)
    return load_codec(folder)


def load_codec(folder: Path) -> Codec:
    """The codec of a prepared corpus."""
    return Subwords(folder / FILE) if (folder / FILE).exists() else Bytes()


def byte_tokenizer() -> Tokenizer:
    """What `Bytes` does, as a tokenizer.json of Hugging Face's library: token = byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Bytes that are no visible character of Latin-1 stand for those from U+0100 on, in their order (as in GPT-2).
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in visible]
    vocab = {chr(byte if byte in visible else 0x100 + others.index(byte)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return tokenizer


def _head(texts: Iterable[bytes]) -> Iterator[str]:
    size = 0
    for text in texts:
        yield text.decode()
        size += len(text)
        if size >= LEARN_FROM:
            return


def _learn(texts: Iterator[str], vocab: int) -> Tokenizer:
    """Byte-level BPE with GPT-2's division into words (Radford et al. 2019); the same text gives the same tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
