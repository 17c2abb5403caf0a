"""The bench of callbacks: runs that take turns, and what each adds to a step."""

import json
import logging
import threading

import pytest
import torch

from trainkit.bench import __main__ as bench
from trainkit.bench import callbacks
from trainkit.launch.console import log

SMALL = ["callbacks", "--scale", "0.02", "--batch", "2", "--cadence", "2", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_json_has_every_run_and_none_is_left_behind(capsys):
    before = threading.active_count()
    assert bench.main([*SMALL, "--looks", "1", "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["hardware"]["threads"] == 1
    assert said["parameters"] > 0
    *runs, look = said["results"]
    assert [run["name"] for run in runs] == [
        f"{name} / none" for name in ("default", "default, every step", "diagnostics")
    ]
    assert [run.get("limit") for run in runs] == [1.01, 1.03, None]
    assert all(run["ratio"] > 0 for run in runs)
    assert look["steps"] == pytest.approx(look["seconds"] / runs[0]["seconds_b"])
    assert threading.active_count() == before
    assert not any(isinstance(handler, logging.FileHandler) for handler in log.handlers)


def test_ratios_are_those_of_neighbours(capsys):
    found = {"seconds": {"none": [1.0, 2.0, 4.0], "default": [1.1, 2.0, 4.4], "look": [1.5]}}
    found["inside"] = {"none": [0.1, 0.1, 0.1], "default": [0.3, 0.2, 0.2], "look": [0.5]}
    given = type("Given", (), {"cadence": 2})
    default, look = callbacks.results(found, given)
    assert default["ratio"] == pytest.approx(1.1)
    assert default["inside"] == pytest.approx(0.05)
    assert (default["seconds_a"], default["seconds_b"]) == (1.0, 1.0)
    assert (look["seconds"], look["steps"]) == (0.5, 0.5)
    said = callbacks.table(found, given)
    assert "+10.00%" in said
    assert "500 ms, 0.5 steps" in said


def test_a_run_takes_the_steps_that_it_is_told_to(tmp_path):
    given = type("Given", (), {"scale": 0.02, "batch": 2, "threads": 1, "accelerator": "cpu", "clock": "cpu"})
    run = callbacks.Paced("one", ["trainer.log_every_n_steps=1"], tmp_path, given)
    with callbacks.quiet(tmp_path):
        run.start()
        for steps in (2, 3):
            run.advance(steps)
        lines = (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
        run.stop()
    assert run.spent > 0
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("words", [["--scale", "0"], ["--rounds", "0"], ["--looks", "-1"]])
def test_mistakes_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(["callbacks", *words])
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
