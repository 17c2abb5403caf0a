"""A sweep ends with its report, and no report can fail a sweep. The jobs are tests/launch/fake_run.py."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainkit.launch import sweep as module
from trainkit.launch.console import log, to_terminal
from trainkit.launch.preflight import check
from trainkit.report import page

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(module, "RUN", ROOT / "tests" / "launch" / "fake_run.py")


@pytest.fixture
def told():
    """What sweeps say, as lines."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    to_terminal()
    handler = Handler()
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def go(tmp_path: Path, *words: str) -> int:
    return module.sweep(check(["-m", *words, f"paths.run_dir={tmp_path / 'sweep'}"]))


def test_a_sweep_writes_its_report_and_says_where(tmp_path, told):
    assert go(tmp_path, "norm=pre,post", "seed=0,1") == 1  # post fails
    out = tmp_path / "sweep" / "report.html"
    assert told[-1] == f"report {out}"
    text = out.read_text()
    assert "norm=pre has the lowest validation loss: 2.0500\u00a0±\u00a00.64." in text
    assert "NonFiniteLoss: the loss is nan" in text


def test_a_report_that_fails_is_one_warning(tmp_path, told, monkeypatch):
    def broken(*_):
        raise RuntimeError("no room\nfor this")

    monkeypatch.setattr(page, "write", broken)
    assert go(tmp_path, "norm=pre", "seed=0,1") == 0
    assert told[-1] == (
        "the report could not be written (RuntimeError: no room for this); the sweep's numbers are in summary.md"
    )
    assert not (tmp_path / "sweep" / "report.html").exists()


def test_an_interrupted_sweep_has_a_report_of_what_there_is(tmp_path, told, interruptible):
    def interrupt():
        while not (tmp_path / "sweep" / "1" / "pids").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert go(tmp_path, "norm=pre,lns,keel") == 130
    thread.join()
    assert told[-1] == f"report {tmp_path / 'sweep' / 'report.html'}"
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert "1 finished · 1 interrupted · 1 waiting" in text


def test_starting_a_sweep_does_not_pay_for_the_report():
    code = (
        "import sys, trainkit.launch.sweep; print([m for m in ('plotly', 'trainkit.report.page') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
