"""data=stream: which windows a step sees, from many files; and what cannot be trained on."""

import json
import os
import resource
import tracemalloc
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import trainkit
from tests.data.test_loader import rig
from tests.data.test_shard_files import llm_c, npy, raw
from trainkit.data import shards
from trainkit.data.shard_files import Shard, Shards, look
from trainkit.data.shard_windows import ShardWindows, spread_over
from trainkit.data.stream import TokenStream
from trainkit.data.text import Text
from trainkit.data.windows import windows_per_epoch
from trainkit.launch.explain import UserError
from trainkit.report.metrics_file import read

CONTEXT = 4
LENGTHS = (400, 37, 4, 260, 5)  # of five files: one is shorter than a window, one just as long
SMALL = {"context": CONTEXT, "batch_size": 8, "val_batches": 2, "test_batches": 2}
LINES = [f"line number {i}, and a little more of it\n" for i in range(900)]


def flat(lists):
    return list(chain.from_iterable(lists))


@pytest.fixture
def numbers(tmp_path):
    """Files in which every token is its own number."""
    begin = 0
    for i, length in enumerate(LENGTHS):
        npy(tmp_path / f"train_{i}.npy", np.arange(begin, begin + length))
        begin += length
    npy(tmp_path / "val_0.npy", np.arange(300))
    return tmp_path


def stream(path, trainer=None, **keywords):
    data = TokenStream(path=str(path), **SMALL | {"vocab": 1000} | keywords)
    data.trainer = trainer
    data.prepare_data()
    return data


def steps(path, world=1, accumulation=1, step=0, **keywords):
    """First tokens of the windows of every optimizer step, over all processes and accumulated batches."""
    taken = []
    for rank in range(world):
        batches = stream(path, rig(world, rank, accumulation, step), **keywords).train_dataloader()
        firsts = [inputs[:, 0].tolist() for inputs, _ in batches]
        taken.append([flat(firsts[i : i + accumulation]) for i in range(0, len(firsts), accumulation)])
    return [flat(parts) for parts in zip(*taken, strict=True)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (2, 4), (4, 2), (8, 1), (1, 8)])
def test_a_step_sees_the_same_windows_however_it_is_shared_out(numbers, world, accumulation, workers):
    alone, shared = steps(numbers), steps(numbers, world, accumulation, workers=workers)
    assert len(alone) == sum(windows_per_epoch(length, CONTEXT) for length in LENGTHS) // 8
    assert [sorted(step) for step in shared] == [sorted(step) for step in alone]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_position_is_the_global_step(numbers, workers):
    epoch = len(steps(numbers))
    for step in (0, 1, epoch - 1, epoch, epoch + 1, 3 * epoch + 5):
        whole = steps(numbers, step=step - step % epoch)
        assert steps(numbers, step=step, workers=workers) == whole[step % epoch :]
    assert steps(numbers) != steps(numbers, step=epoch)
    assert steps(numbers) != steps(numbers, seed=1)


@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=12), st.integers(1, 9), st.integers(0, 99), st.integers(0, 99)
)
def test_an_epoch_is_every_window_of_every_file_once(lengths, context, seed, epoch):
    """The files are only named: what is asked of them is recorded."""
    asked = []

    class Named(Shards):
        def gather(self, owners, starts, context):
            asked.extend(zip(owners.tolist(), starts.tolist(), strict=True))

    windows = ShardWindows(Named([Shard(Path("x"), "uint16", 0, length) for length in lengths], 1000), context)
    assert len(windows) == sum(windows_per_epoch(length, context) for length in lengths)
    draw = windows.epoch(seed, epoch)
    for begin in range(0, len(windows), 3):
        draw(slice(begin, min(begin + 3, len(windows))))
    assert len(asked) == len(windows)
    for number, length in enumerate(lengths):
        starts = sorted(start for owner, start in asked if owner == number)
        count = windows_per_epoch(length, context)
        assert starts == [starts[0] + i * context for i in range(count)] if count else not starts
        if count:
            assert 0 <= starts[0] < context
            assert starts[-1] + context + 1 <= length


def test_every_phase_occurs(numbers):
    windows = stream(numbers).source()
    first = [min(start % CONTEXT for start in flat_starts(windows, epoch)) for epoch in range(40)]
    assert set(first) == set(range(CONTEXT))


def flat_starts(windows, epoch):
    """Where the windows of the first file start."""
    inputs, _ = windows.epoch(0, epoch)(slice(0, len(windows)))
    return [start for start in inputs[:, 0].tolist() if start < LENGTHS[0]]


def test_targets_follow_inputs_within_a_file(numbers):
    inputs, targets = stream(numbers).source().epoch(0, 0)(slice(0, 100))
    assert inputs.dtype == targets.dtype == torch.int64
    assert (targets == inputs + 1).all()
    assert (inputs[:, 1:] == inputs[:, :-1] + 1).all()
    first, last = (
        np.searchsorted(np.cumsum(LENGTHS), tokens, side="right")
        for tokens in (inputs[:, 0].numpy(), targets[:, -1].numpy())
    )
    np.testing.assert_array_equal(first, last)


@given(
    st.lists(st.integers(1, 120), min_size=1, max_size=12).filter(lambda lengths: max(lengths) > 5), st.integers(1, 80)
)
def test_evaluation_windows_share_no_target_and_reach_over_all_files(lengths, count):
    context, asked = 5, []

    class Named(Shards):
        def gather(self, owners, starts, context):
            asked.extend(zip(owners.tolist(), starts.tolist(), strict=True))

    items, draw = spread_over(
        Named([Shard(Path("x"), "uint16", 0, length) for length in lengths], 1000), context, count
    )
    draw(items)
    available = [(owner, start) for owner, n in enumerate(lengths) for start in range(0, n - context, context)]
    assert len(asked) == min(count, len(available))
    places = [available.index(window) for window in asked]
    assert len(set(places)) == len(places)
    gaps = np.diff(places)
    assert places[0] == 0
    if len(gaps):
        assert gaps.max() - gaps.min() <= 1


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Two trillion tokens in sparse files: eight bytes for each of their windows would be 16 GB."""
    for i in range(50):
        np.lib.format.open_memmap(tmp_path / f"train_{i}.npy", mode="w+", dtype=np.uint16, shape=(1,))
        with open(tmp_path / f"train_{i}.npy", "r+b") as file:
            header = {"descr": "<u2", "fortran_order": False, "shape": (40 * 10**9,)}
            np.lib.format.write_array_header_1_0(file, header)
            file.truncate(file.tell() + 80 * 10**9)
    npy(tmp_path / "val.npy", np.arange(20_000) % 999)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    data = stream(tmp_path, context=1024, workers=2)
    batches = iter(data.train_dataloader())
    seen = [next(batches)[0].shape for _ in range(50)]
    batches.close()
    assert len(data.source()) > 1.9e9
    assert set(seen) == {(8, 1024)}
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # KB


# --- shards of ours ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A text, and a folder of its shards."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "in.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    text = Text(path=str(folder / "in.jsonl"), cache_dir=str(folder / "cache"), tokenizer="bpe", tokenizer_vocab=300)
    shards.write(folder / "shards", text, 1000)
    return text, folder / "shards"


@pytest.fixture
def own(written, tmp_path):
    """A copy that may be damaged."""
    for path in written[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_an_index_tells_all_that_the_text_would(written):
    text, folder = written
    data = stream(folder, vocab=None)
    facts = data.facts()
    assert {name: facts[name] for name in text.facts()} == text.facts()
    assert data.codec.decode([80, 90, 100]) == text.codec.decode([80, 90, 100])
    assert data.tokenizer_path() == folder / "tokenizer.json"
    again = stream(folder, **facts)
    assert again.facts() == facts
    assert stream(folder, vocab=320).facts()["vocab"] == 320  # rounded up, for speed
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert sum(len(inputs) for inputs, _ in loader) == 16


def test_files_are_the_same_wherever_they_lie(written, own):
    assert stream(own, vocab=None).facts() == stream(written[1], vocab=None).facts()


def damage(own, how):
    first = own / "train_000000.npy"
    if how == "missing":
        first.unlink()
    elif how == "cut":
        os.truncate(first, 1000)
    elif how == "changed":
        tokens = np.load(first)
        tokens[0] += 1
        np.save(first, tokens)
    elif how == "shorter":
        np.save(first, np.load(first)[:-1])
    elif how == "index":
        (own / "index.json").write_text("{")
    elif how == "format":
        (own / "index.json").write_text((own / "index.json").read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("vocab"), r"index\.json does not say its vocab\. Copy it again"),
        (lambda index: index.update(dtype=None, shards=[]), r"index\.json does not say its dtype and shards"),
        (lambda index: index["shards"].pop("val"), r"index\.json cannot be read: KeyError\('val'\)"),
        (lambda index: index["shards"]["train"][0].pop("name"), r"index\.json cannot be read: KeyError\('name'\)"),
        (lambda index: index["shards"]["train"][0].update(tokens="9"), r"does not say its shards\.tokens"),
        (lambda index: index["shards"].update(train=[1]), r"index\.json cannot be read: TypeError"),
    ],
)
def test_an_index_that_lacks_something(own, change, message):
    index = json.loads((own / "index.json").read_text())
    change(index)
    (own / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        stream(own, vocab=None)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"train_000000\.npy cannot be read: No such file"),
        ("cut", r"train_000000\.npy is cut short or is none: 1,000 tokens of uint16"),
        ("changed", r"train_000000\.npy holds other tokens than when it was written\. Copy it again"),
        ("shorter", r"train_000000\.npy has 999 tokens of uint16, and index\.json beside it says 1,000"),
        ("index", r"index\.json cannot be read"),
        ("format", r"index\.json must be of format 1; it has 2"),
    ],
)
def test_shards_that_are_not_as_they_were_written(own, how, message):
    damage(own, how)
    with pytest.raises(ValueError, match=message):
        stream(own, vocab=None)


def test_a_run_goes_on_with_the_same_files_alone(written, own):
    facts = stream(own, vocab=None).facts()
    index = json.loads((own / "index.json").read_text())
    index["shards"]["train"].pop()
    (own / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"differs from the one the run was started with: data\.fingerprint was"):
        stream(own, **facts).facts()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"vocab": 299}, r"data\.vocab=299 is less than the 300 tokens of the text"),
        ({"dtype": "uint8"}, r"data\.dtype is for files without an index, .*index\.json says it; leave it out"),
        ({"val_path": "x"}, r"data\.val_path is for files without an index"),
        ({"batch_size": 10**6}, r"data\.batch_size=1000000 needs as many windows .* has \d+\."),
        ({"context": 1000}, r"data\.context=1000 needs at least 1001 tokens in each part of the text; "),
        ({"workers": -1, "trainer": rig()}, r"data\.workers must not be negative"),
    ],
)
def test_settings_that_do_not_fit_the_index(written, keywords, message):
    with pytest.raises(ValueError, match=message):
        stream(written[1], **{"vocab": None} | keywords).setup("fit")


# --- shards of others --------------------------------------------------------------------------------------------


def test_names_tell_the_parts_of_files_of_others(tmp_path, caplog):
    tokens = np.arange(500)
    llm_c(tmp_path / "fineweb_train_000001.bin", tokens)
    llm_c(tmp_path / "fineweb_val_000000.bin", tokens[:90])
    (tmp_path / "more").mkdir()
    raw(tmp_path / "more" / "train.bin", tokens[:70])
    raw(tmp_path / "more" / "valuable.bin", tokens[:60])
    (tmp_path / "meta.pkl").write_text("no tokens")
    caplog.set_level("INFO")
    data = stream(tmp_path)
    assert data.lengths() == {"train": [500, 70, 60], "val": [90], "test": [90]}
    assert "has no files for test; the test is on those for validation" in caplog.text
    raw(tmp_path / "test.bin", tokens[:50])
    assert stream(tmp_path).lengths()["test"] == [50]
    assert stream(tmp_path / "*.bin").lengths() == {"train": [500], "val": [90], "test": [50]}
    named = stream(tmp_path, val_path=str(tmp_path / "more")).lengths()
    assert named == {"train": [500, 90], "val": [70, 60], "test": [50]}


def test_of_files_of_others_only_the_vocabulary_is_known(tmp_path):
    raw(tmp_path / "train.bin", np.arange(500))
    raw(tmp_path / "val.bin", np.arange(500))
    data = stream(tmp_path)
    assert set(data.facts()) == {"vocab", "fingerprint"}
    with pytest.raises(ValueError, match=r"is not known; name its tokenizer\.json by data\.tokenizer_file"):
        data.codec  # noqa: B018
    with pytest.raises(ValueError, match=r"data\.vocab must be given, as .* has no index\.json"):
        stream(tmp_path, vocab=None)


def test_a_file_too_short_for_a_window_is_told(numbers, caplog):
    caplog.set_level("INFO")
    stream(numbers)
    assert "1 train files have no more than data.context=4 tokens: left out" in caplog.text


@pytest.mark.parametrize(
    ("files", "keywords", "message"),
    [
        ({}, {}, r"has no files for training: \.npy or \.bin"),
        ({"val.bin": "uint16"}, {}, r"has no files for training"),
        ({"train.bin": "uint16"}, {}, r"has no files for validation\. .* name them by data\.val_path"),
        (
            {"train.bin": "uint16", "val.bin": "uint16"},
            {"vocab": 400},
            r"bin has the token 499, .* beyond data\.vocab=400",
        ),
        ({"train.npy": "uint8", "val.npy": "uint8"}, {}, r"npy is of uint8, which cannot hold all of data\.vocab=1000"),
        (
            {"train.bin": "uint32", "val.bin": "uint32"},
            {"dtype": "float32"},
            r"data\.dtype is one of .*; got 'float32'",
        ),
        (
            {"train.bin": "uint16", "val.bin": "uint16"},
            {"dtype": "uint32"},
            r"beyond data\.vocab=1000\. Set .* data\.dtype",
        ),
        (
            {"train.bin": "uint16"},
            {"val_path": "/nowhere"},
            r"data\.val_path must be a file, a folder or a glob; /nowhere",
        ),
        ({"train.bin": "uint16", "val.bin": ""}, {}, r"val\.bin holds no tokens"),
    ],
)
def test_files_of_others_that_cannot_be_trained_on(tmp_path, files, keywords, message):
    for name, dtype in files.items():
        tokens = np.arange(500) if dtype else np.arange(0)
        (npy if name.endswith("npy") else raw)(tmp_path / name, tokens, dtype or "uint16")
    with pytest.raises(ValueError, match=message):
        stream(tmp_path, **keywords)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(ValueError, match=r"data\.path must be a file, a folder or a glob; .*/nothing does not exist"):
        stream(tmp_path / "nothing")


def test_an_unknown_type_follows_the_vocabulary(tmp_path):
    for name in ("train.bin", "val.bin"):
        raw(tmp_path / name, np.arange(70_000), "uint32")
    assert stream(tmp_path, vocab=100_000).lengths()["train"] == [70_000]
    assert look(tmp_path / "val.bin", "uint32").tokens == 70_000


# --- whole runs --------------------------------------------------------------------------------------------------

RUN = [
    "data=stream", "model.depth=1", "model.width=16", "model.heads=2", "model.context=16", "data.batch_size=4",
    "data.val_batches=1", "data.test_batches=1", "trainer.log_every_n_steps=2", "trainer.threads=1", "logger=none",
    "schedule=constant",
]  # fmt: skip


def losses(run):
    return [(line["step"], line["train/loss"]) for line in read(run / "metrics.jsonl") if "train/loss" in line]


def test_a_run_on_shards_and_its_continuation(written, own, tmp_path_factory):
    words = [*RUN, f"data.path={own}", f"paths.log_dir={tmp_path_factory.mktemp('logs')}"]
    unbroken = trainkit.run([*words, "trainer.max_steps=10"])
    assert unbroken.metrics["val/bits_per_byte"] > 0
    run = trainkit.run([*words, "trainer.max_steps=4"]).dir
    # The files may have moved, and be read by more threads: they are known by their contents.
    resumed = trainkit.run([f"resume={run}", "trainer.max_steps=10", f"data.path={written[1]}", "data.workers=1"])
    assert losses(run) == losses(unbroken.dir)
    assert resumed.metrics["val/loss"] == unbroken.metrics["val/loss"]
    texts = trainkit.run(["mode=sample", f"resume={run}", "sample.tokens=8", "sample.prompt=line"])
    assert (texts.dir / "1.txt").read_text().startswith("line")
    export = trainkit.run(["mode=export", f"resume={run}"]).dir
    assert (export / "tokenizer.json").read_bytes() == (own / "tokenizer.json").read_bytes()
    damage(own, "changed")
    with pytest.raises(UserError, match=r"train_000000\.npy holds other tokens"):
        trainkit.run([f"resume={run}", "trainer.max_steps=12", f"data.path={own}"])


@pytest.mark.slow
def test_a_run_on_files_of_others(tmp_path, tmp_path_factory):
    for name, count in (("train.bin", 3000), ("val.bin", 500)):
        raw(tmp_path / name, np.arange(count) % 50)
    words = [*RUN, f"data.path={tmp_path}", f"paths.log_dir={tmp_path_factory.mktemp('logs')}", "trainer.max_steps=3"]
    with pytest.raises(UserError, match=r"data\.vocab must be given"):
        trainkit.run(words)
    result = trainkit.run([*words, "data.vocab=50"])
    assert "val/loss" in result.metrics
    assert "val/bits_per_byte" not in result.metrics
    with pytest.raises(UserError, match=r"name its tokenizer\.json by data\.tokenizer_file"):
        trainkit.run(["mode=sample", f"resume={result.dir}"])
    raw(tmp_path / "train.bin", np.arange(3000) % 49)
    with pytest.raises(UserError, match=r"differs from the one the run was started with: data\.fingerprint was"):
        trainkit.run([f"resume={result.dir}", "trainer.max_steps=6"])
