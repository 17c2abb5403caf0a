"""Text to tokens and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainkit.data.tokenizer import (
    END,
    FILE,
    Bytes,
    Subwords,
    byte_tokenizer,
    codec_fingerprint,
    load_codec,
    make_codec,
)

SAMPLE = [
    b"the cat sat on the mat; a quick brown fox jumps over lazy dogs every evening.\n" * 30,
    "naïve café 漢字\n".encode() * 10,
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return make_codec(tmp_path_factory.mktemp("bpe"), SAMPLE, kind="bpe", vocab=300, file=None)


@given(st.text())
def test_bytes_are_the_utf8_text(text):
    codec = Bytes()
    assert bytes(codec.encode(text)) == text.encode()
    assert codec.decode(codec.encode(text)) == text
    assert codec.encode_many([text.encode()])[0].tolist() == codec.encode(text)


@given(text=st.text())
def test_bpe_loses_nothing(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert bpe.encode_many([text.encode()])[0].tolist() == bpe.encode(text)


def test_bpe_learns_as_many_tokens_as_asked_for_and_compresses(bpe):
    assert bpe.vocab == 300
    assert len(bpe.encode("the cat sat")) <= 5


def test_bpe_is_the_same_for_the_same_text(bpe, tmp_path):
    again = make_codec(tmp_path, SAMPLE, kind="bpe", vocab=300, file=None)
    assert again.tokenizer.to_str() == bpe.tokenizer.to_str()
    assert load_codec(tmp_path).tokenizer.to_str() == bpe.tokenizer.to_str()


def test_text_cannot_spell_the_separator(bpe):
    tokens = bpe.encode(f"one{END}two")
    assert not set(tokens) & set(bpe.separator)
    assert bpe.decode(tokens) == f"one{END}two"
    assert bpe.decode(bpe.separator) == END


@pytest.fixture
def word_level(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"[UNK]": 0, "cat": 1, "sat": 2, "</s>": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 7)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "words.json"))
    return str(tmp_path / "words.json")


def test_any_tokenizer_file_gives_plain_tokens(word_level, tmp_path):
    (tmp_path / "corpus").mkdir()
    codec = make_codec(tmp_path / "corpus", [], kind="file", vocab=4096, file=word_level)
    assert codec.encode("cat sat cat") == [1, 2, 1]  # no end token, no truncation, no padding
    assert codec.vocab == 8  # the largest token, not the number of words
    assert codec.separator == [7]
    np.testing.assert_array_equal(codec.encode_many([b"cat dog"])[0], [1, 0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "bpe", "vocab": 256, "file": None}, "data.tokenizer_vocab must be at least 257"),
        ({"kind": "file", "vocab": 1, "file": None}, "data.tokenizer=file needs data.tokenizer_file"),
        ({"kind": "byte", "vocab": 1, "file": "x.json"}, "read by data.tokenizer=file alone; got data.tokenizer=byte"),
        ({"kind": "file", "vocab": 1, "file": "/no/such.json"}, "/no/such.json is no file"),
        ({"kind": "bytes", "vocab": 1, "file": None}, "data.tokenizer is one of byte, bpe, file; got 'bytes'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        codec_fingerprint(**settings)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"data\.tokenizer_file must be a tokenizer\.json"):
        load_codec(tmp_path)


def test_the_fingerprint_tells_tokenizers_apart(word_level, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    seen = [
        codec_fingerprint(kind="byte", vocab=1, file=None),
        codec_fingerprint(kind="bpe", vocab=300, file=None),
        codec_fingerprint(kind="bpe", vocab=301, file=None),
        codec_fingerprint(kind="file", vocab=1, file=word_level),
        codec_fingerprint(kind="file", vocab=1, file=str(tmp_path / "other.json")),
    ]
    assert len({str(one) for one in seen}) == len(seen)
    assert codec_fingerprint(kind="byte", vocab=2, file=None) == seen[0]  # a size that byte does not read


def test_the_byte_tokenizer_of_an_export_is_the_same_code(tmp_path):
    byte_tokenizer().save(str(tmp_path / FILE))
    theirs, ours = Subwords(tmp_path / FILE), Bytes()
    text = "naïve – 語\n\tx = 1\r\x00\x7f" + "".join(map(chr, range(1, 256)))
    assert theirs.vocab == ours.vocab
    assert theirs.encode(text) == ours.encode(text)
    assert theirs.decode(theirs.encode(text)) == text


def test_what_a_tokenizer_does_not_know_is_told(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])).save(str(tmp_path / FILE))
    assert Subwords(tmp_path / FILE).unknown("abba c é c") == ["c", "é"]  # which it would leave out
    replacing = models.BPE(vocab={"a": 0, "?": 1}, merges=[], unk_token="?")
    Tokenizer(replacing).save(str(tmp_path / FILE))
    assert Subwords(tmp_path / FILE).unknown("a語a") == ["語"]
    assert Subwords(tmp_path / FILE).unknown("aa") == Bytes().unknown("語") == []
