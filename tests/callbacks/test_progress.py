"""What a run says, and when."""

import io
import logging
import re

import pytest

from callbacks.grad_norm import GradNorm
from callbacks.learning_rate import LearningRate
from callbacks.progress import Progress, duration, thousands
from callbacks.throughput import Throughput
from tests.callbacks.toy import Toy, fit, rows
from trainkit.launch import console


def test_one_line_per_logging_step_and_validation_in_order(tmp_path, said):
    fit(tmp_path, [Progress()], log_every_n_steps=5)
    assert [re.match(r"step (\d+)/12  (\S+)", line).groups() for line in said] == [
        ("1", "train/loss"), ("4", "val/loss"), ("5", "train/loss"), ("8", "val/loss"), ("10", "train/loss"),
        ("12", "train/loss"), ("12", "val/loss"),
    ]  # fmt: skip
    assert re.fullmatch(r"step 5/12  train/loss [\d.]+  eta 0:\d\d", said[2])


def test_metrics_are_said_as_they_were_logged_and_gradient_norms_are_not(tmp_path, said):
    fit(tmp_path, [Progress(), GradNorm(), LearningRate(), Throughput()], val_check_interval=100)
    row = rows(tmp_path)[1]
    speed = thousands(row["tokens_per_second"])
    assert said[1].startswith(f"step 2/12  train/loss {row['train/loss']:.4g}  lr 1.0e-02  {speed} tok/s  eta ")
    assert not any("grad_norm" in line for line in said)


def test_on_a_terminal_a_bar_moves_and_the_file_has_the_lines(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr(console.log, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(console.log, "level", logging.INFO)
    monkeypatch.setenv("COLUMNS", "120")
    with console.to_file(tmp_path / "run.log"):
        fit(tmp_path, [Progress()])
    shown = terminal.getvalue()
    assert "12/12" in shown
    assert shown.count("val/loss") == 3
    text = (tmp_path / "run.log").read_text()
    assert text.count("train/loss") == 7
    assert text.count("val/loss") == 3


def test_an_exception_ends_the_bar(tmp_path, monkeypatch):
    progress = Progress()

    class Fails(Toy):
        def loss(self, model, batch):
            raise RuntimeError("broken")

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, [progress], task=Fails())
    assert progress.bar is None


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (62.4, "1:02"), (3599.6, "1:00:00"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(7.25, "7.25"), (950, "950"), (12345, "12.3k"), (2.5e6, "2.5M"), (3e9, "3G")]
)
def test_thousands(number, text):
    assert thousands(number) == text
