"""From documents to pieces: nothing is lost, every part is cut where it should be."""

from collections import defaultdict
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data import documents
from trainkit.data.documents import FEW, Document, drawn, pieces

TEXT = st.text(alphabet="ab é漢🎈\n", max_size=60)


def named(texts):
    return [Document(f"{i}.txt".encode(), text.encode()) for i, text in enumerate(texts)]


@given(st.lists(TEXT, max_size=12), st.integers(8, 40))
def test_pieces_are_whole_characters_and_add_up_to_the_documents(texts, size):
    with mock.patch.object(documents, "PIECE", size):
        cut = list(pieces(named(texts)))
    assert "".join(piece.data.decode() for piece in cut) == "".join(texts)
    assert all(0 < len(piece.data) <= size for piece in cut)
    assert sum(piece.ends for piece in cut) == sum(bool(text) for text in texts)


@given(st.lists(TEXT, min_size=1, max_size=12))
def test_few_documents_are_cut_by_position(texts):
    cut = list(pieces(named(texts)))
    parts = [piece.part for piece in cut]
    assert parts == sorted(parts, key=("train", "val", "test").index)
    size, total = 0, len("".join(texts).encode())
    for part, share in (("train", 0.90), ("val", 0.95), ("test", 1.0)):
        size += sum(len(piece.data) for piece in cut if piece.part == part)
        assert share * total - 4 < size <= share * total  # up to a character


def test_many_documents_are_drawn_by_their_key_and_keep_their_part_when_others_come():
    keys = [f"pkg/module_{i}.py".encode() for i in range(20 * FEW)]
    parts = {piece.data: piece.part for piece in pieces(Document(key, key) for key in keys)}
    more = [b"new/" + key for key in keys] + keys
    assert parts == {piece.data: piece.part for piece in pieces(Document(k, k) for k in more) if piece.data in parts}
    shares = {part: list(parts.values()).count(part) / len(keys) for part in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.90, "val": 0.05, "test": 0.05}, abs=0.02)


def test_the_switch_from_few_to_many_loses_nothing():
    for count in (FEW - 1, FEW, FEW + 1):
        cut = list(pieces(Document(str(i).encode(), b"x%d;" % i) for i in range(count)))
        assert b"".join(piece.data for piece in cut) == b"".join(b"x%d;" % i for i in range(count))
        by_key = [piece.part == drawn(piece.data[1:-1]) for piece in cut]
        assert all(by_key) == (count >= FEW)


def test_a_source_may_decide_the_part():
    own = [Document(b"a", b"AA", "test"), Document(b"b", b"BB", "val")]
    cut = defaultdict(bytes)
    for piece in pieces([*own, *named(["c" * 100])]):
        cut[piece.part] += piece.data
    assert cut == {"train": b"c" * 90, "val": b"BB" + b"c" * 5, "test": b"AA" + b"c" * 5}


def test_long_documents_are_cut_after_lines_then_words():
    with mock.patch.object(documents, "PIECE", 10):
        cut = [piece.data for piece in pieces([Document(b"x", b"aaaa aa\nbb cc ddddddddddddddd ee", "train")])]
    assert cut == [b"aaaa aa\n", b"bb cc ", b"dddddddddd", b"ddddd ee"]


@given(st.integers(0, 300), st.sampled_from([b"\xff", b"\xe9a", b"\xf0\x9f"]))
def test_an_undecodable_byte_is_named_with_file_and_offset(offset, broken):
    document = Document(b"latin.txt", b"a" * offset + broken + b"a" * 50)
    with mock.patch.object(documents, "PIECE", 64), pytest.raises(ValueError) as error:
        list(pieces([document]))
    assert f"latin.txt has the byte 0x{broken[0]:02x} at offset {offset}." in str(error.value)
