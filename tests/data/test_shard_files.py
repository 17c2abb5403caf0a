"""Token files of every kind, and stretches of them."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from trainkit.data import shard_files
from trainkit.data.shard_files import DTYPES, LLM_C, Descriptor, Shards, look

TOKENS = np.arange(1000) % 250


def llm_c(path, tokens, magic=20240520, version=None, count=None):
    right, dtype = LLM_C[magic]
    header = np.zeros(256, "<i4")
    header[:3] = magic, right if version is None else version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())
    return path


def npy(path, tokens, dtype="uint16"):
    np.save(path, tokens.astype(dtype))
    return path


def raw(path, tokens, dtype="uint16"):
    path.write_bytes(tokens.astype(dtype).tobytes())
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_numpy_and_nanogpt_write_is_read(tmp_path, dtype):
    for shard in (look(npy(tmp_path / "a.npy", TOKENS, dtype)), look(raw(tmp_path / "a.bin", TOKENS, dtype), dtype)):
        assert (shard.dtype, shard.tokens) == (dtype, 1000)
        inputs, targets = Shards([shard], 250).gather(np.zeros(3, np.int64), np.array([0, 995, 17]), 4)
        for row, start in enumerate((0, 995, 17)):
            assert inputs[row].tolist() == TOKENS[start : start + 4].tolist()
            assert targets[row].tolist() == TOKENS[start + 1 : start + 5].tolist()
        assert inputs.is_contiguous()
        assert targets.is_contiguous()


@pytest.mark.parametrize("magic", LLM_C)
def test_what_llm_c_writes_is_read(tmp_path, magic):
    shard = look(llm_c(tmp_path / "a.bin", TOKENS, magic), "uint8")  # the file says its type
    assert (shard.dtype, shard.offset, shard.tokens) == (LLM_C[magic][1], 1024, 1000)
    inputs, _ = Shards([shard], 250).gather(np.array([0]), np.array([0]), 999)
    assert inputs[0].tolist() == TOKENS[:999].tolist()


def test_files_of_others_that_are_wrong(tmp_path):
    cut = npy(tmp_path / "cut.npy", TOKENS)
    os.truncate(cut, 1500)
    odd = raw(tmp_path / "odd.bin", TOKENS)
    os.truncate(odd, 1999)
    wrong = {
        cut: "cut short or is none: 1,000 tokens of uint16 take 2,128 bytes, it has 1,500",
        odd: "cut short or is none: 999 tokens of uint16 take 1,998 bytes, it has 1,999",
        raw(tmp_path / "empty.bin", TOKENS[:0]): "holds no tokens",
        llm_c(tmp_path / "less.bin", TOKENS, count=1001): "1,001 tokens of uint16 take 3,026 bytes, it has 3,024",
        llm_c(tmp_path / "newer.bin", TOKENS, version=2): "must be of version 1 of llm.c's format; it has 2",
        raw(tmp_path / "no.npy", TOKENS): "must be a .npy array",
        npy(tmp_path / "float.npy", TOKENS, "float32"): r"must be one row of integers .*the shape \(1000,\) of <f4",
        npy(tmp_path / "two.npy", TOKENS.reshape(2, -1)): r"must be one row of integers .*\(2, 500\)",
        npy(tmp_path / "big.npy", TOKENS, ">u2"): r"little-endian\); it has the shape \(1000,\) of >u2",
        tmp_path / "missing.bin": "cannot be read: No such file",
    }
    for path, message in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            look(path)
        assert str(path) in str(error.value)


def test_a_digest_tells_other_tokens_at_both_ends_and_other_lengths(tmp_path):
    path = npy(tmp_path / "a.npy", np.arange(50_000))
    digests = {look(path).probe()[0]}
    for at in (0, 49_999):
        changed = np.arange(50_000)
        changed[at] = 1
        digests.add(look(npy(path, changed)).probe()[0])
    digests.add(look(npy(path, np.arange(49_999))).probe()[0])
    assert len(digests) == 4
    assert look(npy(path, np.arange(50_000))).probe() == look(npy(tmp_path / "b.npy", np.arange(50_000))).probe()


@pytest.mark.parametrize(("token", "dtype", "seen"), [(60_000, "uint16", 60_000), (-1, "int32", 2**32 - 1)])
def test_the_largest_token_that_a_probe_meets(tmp_path, token, dtype, seen):
    assert look(npy(tmp_path / "a.npy", np.append(TOKENS, token), dtype)).probe()[1] == seen


def test_files_of_different_types_are_no_part(tmp_path):
    shards = [look(npy(tmp_path / f"{dtype}.npy", TOKENS, dtype)) for dtype in ("uint16", "uint32")]
    with pytest.raises(ValueError, match=r"uint16\.npy has uint16, .*uint32\.npy has uint32"):
        Shards(shards, 250)


def test_a_file_that_becomes_shorter_meanwhile_is_told(tmp_path):
    shards = Shards([look(npy(tmp_path / "a.npy", TOKENS))], 250)
    os.truncate(tmp_path / "a.npy", 1000)
    with pytest.raises(ValueError, match=r"a\.npy has become shorter since the start"):
        shards.gather(np.array([0]), np.array([900]), 16)


@pytest.mark.parametrize(("token", "dtype", "seen"), [(250, "uint16", 250), (-1, "int32", 2**32 - 1)])
def test_a_token_beyond_the_vocabulary_is_told_when_it_is_met(tmp_path, token, dtype, seen):
    shards = Shards([look(npy(tmp_path / f"{i}.npy", np.append(TOKENS, [token] * i), dtype)) for i in range(2)], 250)
    shards.gather(np.array([0, 1]), np.array([984, 984]), 15)
    with pytest.raises(ValueError, match=rf"1\.npy has the token {seen}, which is beyond data\.vocab=250"):
        shards.gather(np.array([0, 1]), np.array([984, 985]), 15)


def test_more_files_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN", 4)
    files = [look(npy(tmp_path / f"{i}.npy", TOKENS + i, "uint16")) for i in range(40)]
    before = len(os.listdir("/proc/self/fd"))

    def read_all(shards):
        owners = [np.random.default_rng(seed).integers(0, 40, 400) for seed in range(8)]
        with ThreadPoolExecutor(8) as pool:
            read = list(pool.map(lambda mine: shards.gather(mine, np.full(400, 5), 3)[0], owners))
        for mine, inputs in zip(owners, read, strict=True):
            np.testing.assert_array_equal(inputs[:, 0].numpy(), mine + 5)
        assert 0 < len(os.listdir("/proc/self/fd")) - before <= 4

    read_all(Shards(files, 1000))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_missing_file_leaves_no_trace(tmp_path):
    with pytest.raises(FileNotFoundError):
        Descriptor(tmp_path / "missing")
