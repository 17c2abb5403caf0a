"""data=python_source, text and hub, from files to batches; and what they say about bad input."""

import ast
import json
import logging
import os
import sysconfig
from itertools import chain
from pathlib import Path

import pytest

from trainkit.data import tokens
from trainkit.data.python_source import PythonSource
from trainkit.data.text import Text

SMALL = {"context": 8, "batch_size": 4, "val_batches": 2, "test_batches": 2}
LINES = [f"line number {i}, and a little more of it\n" for i in range(400)]


@pytest.fixture
def text(tmp_path):
    def make(path, **keywords):
        return Text(path=str(path), cache_dir=str(tmp_path / "cache"), **SMALL | keywords)

    return make


def all_of(data):
    return "".join(data.codec.decode(data.corpus.open(part).tolist()) for part in ("train", "val", "test"))


# --- any source --------------------------------------------------------------------------------------------------


def test_a_file_becomes_batches(tmp_path, text):
    (tmp_path / "input.txt").write_text("".join(LINES))
    data = text(tmp_path / "input.txt")
    assert not (tmp_path / "cache").exists()  # constructing touches nothing
    data.prepare_data()
    data.setup("fit")
    assert all_of(data) == "".join(LINES) + "\0"
    inputs, targets = next(iter(data.train_dataloader()))
    assert inputs.shape == targets.shape == (4, 8)
    assert data.codec.decode(inputs[0].tolist())[1:] == data.codec.decode(targets[0].tolist())[:-1]
    assert sum(len(x) for x, _ in data.val_dataloader()) == 8
    assert sum(len(x) for x, _ in data.test_dataloader()) == 8
    facts = data.facts()
    assert facts["vocab"] == 256
    assert facts["bytes_per_token"] == 1.0
    assert 2 < facts["unigram_entropy"] < 4
    assert {type(value) for value in facts.values()} == {int, float}


def test_facts_of_the_start_are_checked_on_resume(tmp_path, text):
    (tmp_path / "input.txt").write_text("".join(LINES))
    data = text(tmp_path / "input.txt")
    facts = data.facts()
    assert text(tmp_path / "input.txt", **facts).facts() == facts
    (tmp_path / "input.txt").write_text("".join(LINES).replace("number", "NUMBER"))
    with pytest.raises(ValueError, match=r"the corpus differs from the one the run was started with: data\.unigram"):
        text(tmp_path / "input.txt", **facts).facts()


def test_subwords_of_a_corpus(tmp_path, text):
    (tmp_path / "input.txt").write_text("".join(LINES))
    data = text(tmp_path / "input.txt", tokenizer="bpe", tokenizer_vocab=300)
    assert data.facts()["vocab"] == 300
    assert data.facts()["bytes_per_token"] > 2
    assert all_of(data) == "".join(LINES) + "<|endoftext|>"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"context": 1000}, r"data\.context=1000 needs at least 1001 tokens in each part of the text; val has \d+\."),
        (
            {"batch_size": 5000},
            r"data\.batch_size=5000 needs as many windows of data\.context=8 tokens; .* has 18\d\d\.",
        ),
        ({"batch_size": 0}, r"data\.batch_size must be at least 1; got 0"),
    ],
)
def test_text_too_short_for_the_settings_is_refused_with_numbers(tmp_path, text, keywords, message):
    (tmp_path / "input.txt").write_text("".join(LINES))
    with pytest.raises(ValueError, match=message):
        text(tmp_path / "input.txt", **keywords).prepare_data()


# --- python_source -----------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of 300 modules, tests and installed packages beside them."""
    root = tmp_path / "lib"
    for i in range(300):
        path = root / f"package_{i % 7}" / f"module_{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function_{i}():\n    return {i} * 'some text'\n")
    for name in ("test", "package_1/tests", "site-packages", "idlelib/idle_test", "__pycache__"):
        (root / name).mkdir(parents=True)
        (root / name / "left_out.py").write_text("SECRET = 1\n")
    (root / "package_1" / "data.txt").write_text("SECRET = 2\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_python_source_is_the_library_without_tests(tmp_path, library, caplog):
    caplog.set_level(logging.INFO)
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    data = PythonSource(cache_dir=str(tmp_path / "cache"), **SMALL)
    data.prepare_data()
    assert "SECRET" not in all_of(data)
    assert sum(data.corpus.documents.values()) == 300
    assert all(data.corpus.documents.values())
    assert "data=python_source leaves out 1 files that are not UTF-8" in caplog.messages
    modules = [path.relative_to(library).as_posix() for path in library.rglob("module_*.py")]
    texts = [(library / name).read_text() for name in sorted(modules)]
    train = data.codec.decode(data.corpus.open("train").tolist()).split("\0")[:-1]
    assert train == [text for text in texts if text in set(train)]  # in the order of their paths


def test_python_source_follows_the_contents_not_the_times(tmp_path, library):
    first = PythonSource(cache_dir=str(tmp_path / "cache"), **SMALL).corpus
    os.utime(library / "package_0" / "module_0.py", (0, 0))
    assert PythonSource(cache_dir=str(tmp_path / "cache"), **SMALL).corpus == first
    (library / "package_0" / "module_0.py").write_text("changed = True\n")
    assert PythonSource(cache_dir=str(tmp_path / "cache"), **SMALL).corpus.folder != first.folder


def test_an_interpreter_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"needs the library's \.py files; .* has none\. Try data=text"):
        PythonSource(cache_dir=str(tmp_path / "cache")).prepare_data()


def test_this_interpreters_own_library_is_a_corpus(tmp_path):
    facts = PythonSource(cache_dir=str(tmp_path)).facts()
    assert facts["vocab"] == 256
    assert 2.9 < facts["unigram_entropy"] < 3.5


def test_text_libraries_are_imported_only_when_used():
    for path in Path(tokens.__file__).parent.glob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                imported = {alias.name for alias in statement.names} | {getattr(statement, "module", "")}
                assert not {"datasets", "tokenizers", "pyarrow"} & {name.split(".")[0] for name in imported}, path


# --- text --------------------------------------------------------------------------------------------------------


def test_a_folder_is_all_its_files_in_order(tmp_path, text):
    for name, part in (("b/x.txt", LINES[:200]), ("a.md", LINES[200:]), (".hidden", ["no"]), ("b/empty.txt", [])):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("".join(part))
    assert all_of(text(tmp_path / "in")) == "".join(LINES[200:]) + "\0" + "".join(LINES[:200]) + "\0"
    assert all_of(text(tmp_path / "in" / "**" / "*.txt")) == "".join(LINES[:200]) + "\0"


def test_paths_are_relative_to_the_working_directory_and_the_home(tmp_path, text, monkeypatch):
    (tmp_path / "input.txt").write_text("".join(LINES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("input.txt", "./*.txt", "~/input.txt"):
        assert all_of(text(path)) == "".join(LINES) + "\0"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_are_documents_and_equal_rows_share_a_part(tmp_path, text, suffix):
    rows = [{"id": i, "body": LINES[i % 300]} for i in range(600)] + [{"id": -1, "body": None}, {"id": -2, "body": ""}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    data = text(path, field="body")
    parts = {part: data.codec.decode(data.corpus.open(part).tolist()).split("\0") for part in ("train", "val", "test")}
    assert sum(data.corpus.documents.values()) == 600
    assert not set(parts["train"]) & set(parts["val"]) - {""}
    assert set(chain.from_iterable(parts.values())) - {""} == set(LINES[:300])


@pytest.mark.parametrize(
    ("files", "path", "message"),
    [
        (
            {"input.txt": b"x"},
            "inptu.txt",
            r"data\.path must be a file, .* does not exist\. Did you mean .*/input\.txt\?",
        ),
        ({"corpus/a.txt": b"x"}, "corpsu/a.txt", r"does not exist\. Did you mean .*/corpus\?"),
        ({"input.txt": b"x"}, "zzz", r"zzz does not exist, and there is nothing of a similar name in "),
        ({"empty.txt": b""}, "empty.txt", r"data\.path=.*empty\.txt must hold text"),
        ({"in/.keep": b"x"}, "in", r"data\.path=.*in must hold text"),
        ({"a.txt": b"x"}, "*.md", r"data\.path=.*\.md must hold text"),
        ({"a.txt": b"caf\xe9 " * 400}, "a.txt", r"a\.txt has the byte 0xe9 at offset 3\."),
        ({"a.jsonl": b'{"text": "x"}\n{"text": '}, "a.jsonl", r"a\.jsonl:2 must be a line of JSON"),
        ({"a.jsonl": b'{"txt": "x"}\n'}, "a.jsonl", r"data\.field=text must be .* it has txt\. Try data\.field=txt"),
        ({"a.jsonl": b'{"text": 3}\n'}, "a.jsonl", r"data\.field=text must hold text; .*a\.jsonl:1 has int there"),
        ({"a.parquet": b"PAR1"}, "a.parquet", r"a\.parquet must be a parquet file"),
    ],
)
def test_bad_input_is_one_clear_sentence(tmp_path, text, files, path, message):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        text(tmp_path / path).prepare_data()
    assert "\n" not in str(error.value)


# --- hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    from trainkit.data.hub import Hub

    def make(name, **keywords):
        return Hub(name=str(name), cache_dir=str(tmp_path / "cache"), **SMALL | keywords)

    return make


def repository(folder, **splits):
    import pyarrow as pa
    from pyarrow import parquet

    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        parquet.write_table(pa.table({"text": rows}), folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def rows_of(data, part):
    return data.codec.decode(data.corpus.open(part).tolist()).split("\0")[:-1]


def test_a_local_folder_with_its_own_splits(tmp_path, hub):
    folder = repository(tmp_path / "set", train=LINES[:300], validation=LINES[300:350], test=LINES[350:])
    data = hub(folder)
    assert [rows_of(data, part) for part in ("train", "val", "test")] == [LINES[:300], LINES[300:350], LINES[350:]]
    assert rows_of(hub(folder, max_documents=50), "train") == LINES[:50]


def test_splits_that_are_missing_are_drawn_from_training(tmp_path, hub):
    none = hub(repository(tmp_path / "none", train=LINES))
    assert sorted(chain.from_iterable(rows_of(none, part) for part in ("train", "val", "test"))) == sorted(LINES)
    own = hub(repository(tmp_path / "own", train=LINES[:350], validation=LINES[350:]))
    assert rows_of(own, "val") == LINES[350:]
    assert rows_of(own, "test") == [line for line in rows_of(none, "test") if line in LINES[:350]]
    assert sorted(rows_of(own, "train") + rows_of(own, "test")) == sorted(LINES[:350])


def test_other_layouts_of_a_local_folder(tmp_path, hub):
    from datasets import Dataset

    Dataset.from_dict({"text": LINES}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "train.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    saved, lines = hub(tmp_path / "saved"), hub(tmp_path / "lines")
    for part in ("train", "val", "test"):
        assert rows_of(saved, part) == rows_of(lines, part)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"field": "txt"}, r"data\.field=txt must be a column of .*; it has text\. Try data\.field=text"),
        ({"split": "trian"}, r"data\.split=trian must be a split of data\.name=.*; it has train"),
        ({"config": "x"}, r"BuilderConfig 'x' not found\. Available: \['default'\]\. Check the name, data\.config"),
    ],
)
def test_choices_that_a_data_set_does_not_have(tmp_path, hub, keywords, message):
    with pytest.raises(ValueError, match=message):
        hub(repository(tmp_path / "set", train=LINES), **keywords).prepare_data()


def test_a_data_set_that_is_neither_reachable_nor_cached(hub):
    with pytest.raises(ValueError, match=r"data\.name=somebody/something must be a folder, or .* that can be reached"):
        hub("somebody/something").prepare_data()
