"""The cache: one build, all or nothing; and what is written into it."""

import logging
import threading
import time
from collections import Counter
from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.corpus import find, prepare
from trainkit.data.documents import Document
from trainkit.data.encoding import cross_entropy, write
from trainkit.data.tokenizer import make_codec

TEXT = b"ab\n" * 40


ONE = (Document(b"x", TEXT),)


def build(folder, documents=ONE, kind="byte"):
    def codec(folder, texts):
        return make_codec(folder, texts, kind=kind, vocab=260, file=None)

    write(folder, lambda: documents, label="test", size=lambda: None, make_codec=codec)


def test_a_corpus_is_built_once_and_then_found(tmp_path):
    calls = []

    def counted(folder):
        calls.append(folder)
        build(folder)

    first, second = prepare(tmp_path / "c", counted), prepare(tmp_path / "c", counted)
    assert first == second
    assert len(calls) == 1
    assert bytes(np.concatenate([first.open(part) for part in ("train", "val", "test")])) == TEXT + b"\0"


def test_others_wait_while_one_builds(tmp_path, caplog):
    calls, found = [], []

    def slow(folder):
        calls.append(folder)
        time.sleep(0.3)
        build(folder)

    caplog.set_level(logging.INFO)
    threads = [threading.Thread(target=lambda: found.append(prepare(tmp_path / "c", slow))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(found) == 3
    assert f"waiting for another process that is preparing {tmp_path / 'c'}" in caplog.messages


def test_an_interrupted_build_leaves_no_corpus(tmp_path):
    def interrupted(folder):
        (folder / "train.bin").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "c", interrupted)
    assert [path.name for path in tmp_path.iterdir()] == [".c.lock"]
    assert prepare(tmp_path / "c", build)


def test_the_remains_of_a_killed_build_are_removed(tmp_path):
    (tmp_path / ".c.0123abcd.partial").mkdir()
    (tmp_path / ".c.0123abcd.partial" / "train.bin").write_bytes(b"half")
    prepare(tmp_path / "c", build)
    assert not list(tmp_path.glob("*.partial"))


def test_a_corpus_that_was_cut_short_is_built_again(tmp_path):
    corpus = prepare(tmp_path / "c", build)
    (tmp_path / "c" / "train.bin").write_bytes(b"half")
    assert find(tmp_path / "c") is None
    assert prepare(tmp_path / "c", build) == corpus


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=rf"paths\.cache_dir must be a writable folder.*{tmp_path / 'file'}"):
        prepare(tmp_path / "file" / "corpora" / "c", build)


def test_other_errors_of_a_build_pass_unchanged(tmp_path):
    def broken(folder):
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        prepare(tmp_path / "c", broken)


def test_each_document_ends_with_a_separator_in_its_part(tmp_path):
    parts = {"train": [b"one", b"two"], "val": [b"three"], "test": [b"four", b"five"]}
    documents = [Document(text, text, part) for part, texts in parts.items() for text in texts]
    corpus = prepare(tmp_path / "c", lambda folder: build(folder, documents))
    for part, texts in parts.items():
        assert bytes(corpus.open(part)) == b"".join(text + b"\0" for text in texts)
    assert corpus.documents == {"train": 2, "val": 1, "test": 2}
    assert corpus.bytes_per_token == 1.0


def test_the_smallest_type_that_holds_the_vocabulary_is_used(tmp_path):
    documents = [Document(b"k", TEXT, part) for part in ("train", "val", "test")]
    corpus = prepare(tmp_path / "c", lambda folder: build(folder, documents, "bpe"))
    assert corpus.vocab > 256
    assert corpus.open("train").dtype == np.uint16
    # The document and its separator, which counts as a byte under every tokenizer.
    assert corpus.bytes_per_token == pytest.approx((len(TEXT) + 1) / corpus.tokens["val"])


@given(st.lists(st.integers(0, 9), min_size=1), st.lists(st.integers(0, 9), min_size=1))
def test_unigram_entropy_is_the_loss_of_a_model_that_knows_the_frequencies(train, val):
    seen = Counter(train)
    expected = sum(-log((seen[token] + 1) / (len(train) + 10)) for token in val) / len(val)
    counts = [np.bincount(tokens, minlength=10) for tokens in (train, val)]
    assert cross_entropy(*counts) == pytest.approx(expected)
