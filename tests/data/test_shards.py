"""Text to shards: the same tokens as in the cache, all or nothing, and going on where it was stopped."""

import json

import numpy as np
import pytest

from trainkit.data import encoding, shards
from trainkit.data.__main__ import main
from trainkit.data.documents import PARTS
from trainkit.data.shard_index import INDEX
from trainkit.data.text import Text
from trainkit.data.tokenizer import FILE, load_codec

LINES = [f"line number {i}, and a little more of it\n" for i in range(900)]


@pytest.fixture
def text(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(300):
        (tmp_path / "in" / f"{i}.txt").write_text("".join(LINES[3 * i : 3 * i + 3]))
    return lambda **keywords: Text(path=str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"), **keywords)


def rows(folder):
    index = json.loads((folder / INDEX).read_text())
    return {part: [np.load(folder / entry["name"]) for entry in index["shards"][part]] for part in PARTS}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "tokenizer_vocab": 300}])
def test_shards_hold_what_the_cache_would(tmp_path, text, tokenizer):
    data = text(**tokenizer)
    shards.write(tmp_path / "out", data, 1000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    for part, arrays in rows(tmp_path / "out").items():
        assert {len(array) for array in arrays[:-1]} <= {1000}
        assert 0 < len(arrays[-1]) <= 1000
        np.testing.assert_array_equal(np.concatenate(arrays), data.corpus.open(part))
        assert arrays[0].dtype == data.corpus.dtype
        assert [entry["tokens"] for entry in index["shards"][part]] == [len(array) for array in arrays]
    for name in ("vocab", "dtype", "tokens", "documents", "bytes_per_token", "unigram_entropy"):
        assert index[name] == getattr(data.corpus, name)
    assert (
        index["tokenizer"]
        == ("file" if tokenizer else "byte")
        == ("file" if (tmp_path / "out" / FILE).exists() else "byte")
    )
    assert load_codec(tmp_path / "out").decode([72, 73]) == data.codec.decode([72, 73])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "in", "out"]


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "tokenizer_vocab": 300}])
@pytest.mark.parametrize("seconds", [-1.0, 1e9])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path, text, monkeypatch, tokenizer, seconds):
    """Stopped while batch after batch is encoded, where each has been noted, and where none has."""
    monkeypatch.setattr(encoding, "BATCH", 4000)
    monkeypatch.setattr(shards, "SECONDS", seconds)
    shards.write(tmp_path / "whole", text(**tokenizer), 700)
    encode, encoded = encoding.Encoder.encode, []

    def stops(self, batch):
        encoded.append(len(batch))
        if len(encoded) % 3 == 0:
            raise KeyboardInterrupt
        return encode(self, batch)

    monkeypatch.setattr(encoding.Encoder, "encode", stops)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            shards.write(tmp_path / "out", text(**tokenizer), 700)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(encoding.Encoder, "encode", encode)
    shards.write(tmp_path / "out", text(**tokenizer), 700)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_done_is_not_encoded_again(tmp_path, text, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 4000)
    monkeypatch.setattr(shards, "SECONDS", -1.0)
    encode, encoded = encoding.Encoder.encode, []

    def counted(self, batch):
        if len(encoded) == 5:
            encoded.append(None)
            raise KeyboardInterrupt
        encoded.append(b"".join(piece.data for piece in batch))
        return encode(self, batch)

    monkeypatch.setattr(encoding.Encoder, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        shards.write(tmp_path / "out", text(), 700)
    shards.write(tmp_path / "out", text(), 700)
    encoded.remove(None)
    assert sum(map(len, encoded)) == sum(map(len, LINES))


def test_the_same_command_twice_does_nothing_and_another_is_refused(tmp_path, text):
    shards.write(tmp_path / "out", text(), 1000)
    before = contents(tmp_path / "out")
    shards.write(tmp_path / "out", text(), 1000)
    assert contents(tmp_path / "out") == before
    with pytest.raises(ValueError, match="must be a new or empty folder; it holds something else"):
        shards.write(tmp_path / "out", text(), 999)
    with pytest.raises(ValueError, match="must have at least 1 token; got 0"):
        shards.write(tmp_path / "other", text(), 0)


def test_the_beginning_of_other_shards_is_not_gone_on_with(tmp_path, text, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH", 4000)
    monkeypatch.setattr(shards, "SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(shards.Row, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            shards.write(tmp_path / "out", text(), 700)
    with pytest.raises(ValueError, match=r"\.out\.partial holds the beginning of other shards, .*; remove it"):
        shards.write(tmp_path / "out", text(), 800)


def test_the_command(tmp_path, text, capsys):
    words = ["data=text", f"data.path={tmp_path / 'in'}", f"paths.cache_dir={tmp_path}"]
    assert main(["shards", str(tmp_path / "out"), *words, "--tokens", "5000"]) == 0
    assert f"python run.py data=stream data.path={tmp_path / 'out'}" in capsys.readouterr().out
    assert {len(array) for array in rows(tmp_path / "out")["train"][:-1]} == {5000}
    for wrong, message in (
        (["data=digits", "task=classify", "model=mlp"], "data=digits is no text"),
        (["data=text", "data.path=/nowhere"], "/nowhere does not exist"),
        (["data=txt"], "did you mean 'text'?"),
    ):
        assert main(["shards", str(tmp_path / "other"), *wrong]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "other").exists()
