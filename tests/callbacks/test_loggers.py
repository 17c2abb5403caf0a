"""Where metrics are written, and that they are read back."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.launch.loggers import JsonlLogger, csv_logger, no_logger, tensorboard_logger
from trainkit.report.metrics_file import line, parse, read, series


@pytest.fixture
def logger(tmp_path):
    return JsonlLogger(tmp_path / "run")


def text(logger: JsonlLogger) -> list[str]:
    return logger.path.read_text().splitlines()


def test_what_belongs_to_one_step_is_one_line(logger):
    logger.log_metrics({"train/loss": 2.5}, step=1)
    logger.log_metrics({"train/loss": 2.25, "lr": 0.1}, step=2)
    logger.log_metrics({"val/loss": torch.tensor(2.0), "lr": 0.5}, step=2)
    logger.log_metrics({"train/loss": 2.0}, step=3)
    assert [json.loads(t) for t in text(logger)] == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "train/loss": 2.25, "lr": 0.5, "val/loss": 2.0},
        {"step": 3, "train/loss": 2.0},
    ]


def test_a_line_that_gets_shorter_leaves_nothing_behind(logger):
    logger.log_metrics({"loss": 1 / 3}, step=1)
    logger.log_metrics({"loss": 0.5}, step=1)
    assert text(logger) == ['{"step": 1, "loss": 0.5}']


def test_every_line_is_on_disk_before_the_next_step(logger):
    for step in range(1, 4):
        logger.log_metrics({"loss": 1.0}, step=step)
        assert len(text(logger)) == step  # read through the file system, the logger still has it open


def test_numbers_that_json_lacks_are_strings_and_come_back(logger):
    logger.log_metrics({"a": math.nan, "b": math.inf, "c": -math.inf, "d": torch.tensor(math.nan)}, step=1)
    assert text(logger) == ['{"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": "NaN"}']
    (row,) = read(logger.path)
    assert math.isnan(row["a"])
    assert (row["b"], row["c"]) == (math.inf, -math.inf)


@given(st.dictionaries(st.text(min_size=1).filter(lambda s: s != "step"), st.floats(allow_nan=False)))
@settings(max_examples=50)
def test_a_row_comes_back_to_the_bit(values):
    assert parse(line({"step": 3} | values).encode()) == {"step": 3} | values


@pytest.mark.parametrize("torn", [b'{"step": 4, "los', b"{", b"\x00\x00", '{"step": 4, "é'.encode()[:-1]])
def test_a_torn_last_line_is_left_out_and_written_over(logger, torn):
    for step in (1, 2, 3):
        logger.log_metrics({"loss": float(step)}, step=step)
    logger.finalize("failed")
    with logger.path.open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in read(logger.path)] == [1, 2, 3]
    logger.log_metrics({"val/loss": 9.0}, step=3)
    logger.log_metrics({"loss": 4.0}, step=4)
    assert series(read(logger.path), "loss") == ([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0])
    assert read(logger.path)[2]["val/loss"] == 9.0


def test_truncate_drops_the_lines_beyond_a_checkpoint(logger):
    for step in (1, 10, 20, 30):
        logger.log_metrics({"loss": float(step)}, step=step)
    logger.finalize("failed")
    with logger.path.open("ab") as file:
        file.write(b'{"step": 4')
    again = JsonlLogger(logger.path.parent)
    again.truncate_after(20)
    again.log_metrics({"val/loss": 1.0}, step=20)
    again.log_metrics({"loss": 0.0}, step=25)
    assert [row["step"] for row in read(logger.path)] == [1, 10, 20, 25]
    again.truncate_after(0)
    assert read(logger.path) == []


def test_a_file_with_a_line_that_is_no_row_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no JSON object with a step"):
        read(path)


def test_an_idle_logger_leaves_no_file(logger):
    logger.finalize("success")
    assert not logger.path.parent.exists()


# --- csv, tensorboard, none ---------------------------------------------------------------------------------------

WORDS = {"run_id": "a1", "name": "toy", "config": {}, "group": None, "resumed": False}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def log_both(run_dir: Path, rows: dict[int, dict[str, float]], *, after: int | None = None) -> None:
    """Logs rows as a run does: metrics.jsonl first, cut behind the step that the run is continued from."""
    jsonl, logger = JsonlLogger(run_dir), csv_logger(run_dir=run_dir, log_dir=run_dir, **WORDS)
    if after is not None:
        jsonl.truncate_after(after)
    for step, metrics in rows.items():
        for name, value in metrics.items():
            for one in (jsonl, logger):
                one.log_metrics({name: value}, step=step)
    for one in (jsonl, logger):
        one.finalize("success")


def test_csv_is_the_metrics_file_as_a_table(tmp_path):
    log_both(tmp_path, {1: {"train/loss": 3.5, "a,b": 1.0}, 2: {"train/loss": 2.5, "val/loss": math.nan}})
    assert table(tmp_path / "metrics.csv") == [
        {"step": "1", "train/loss": "3.5", "a,b": "1.0", "val/loss": ""},
        {"step": "2", "train/loss": "2.5", "a,b": "", "val/loss": "nan"},
    ]


def test_csv_of_a_continued_run_is_one_file_without_the_steps_that_are_done_again(tmp_path):
    log_both(tmp_path, {10: {"loss": 1.0}, 20: {"loss": 2.0}, 30: {"loss": 3.0}})
    log_both(tmp_path, {30: {"loss": 4.0}, 40: {"loss": 5.0, "new": 6.0}}, after=20)
    assert [(row["step"], row["loss"], row["new"]) for row in table(tmp_path / "metrics.csv")] == [
        ("10", "1.0", ""), ("20", "2.0", ""), ("30", "4.0", ""), ("40", "5.0", "6.0"),
    ]  # fmt: skip
    assert len(list(tmp_path.rglob("*.csv"))) == 1


def test_tensorboard_is_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = tensorboard_logger(run_dir=tmp_path, log_dir=tmp_path, **WORDS)
    logger.log_metrics({"train/loss": 0.5}, step=7)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(7, 0.5)]


def test_none_is_no_logger(tmp_path):
    assert no_logger(run_dir=Path(tmp_path), log_dir=Path(tmp_path), **WORDS) == []
