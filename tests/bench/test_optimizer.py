"""The bench of optimizers measures time and state, and sets the paper's claim beside it."""

import json

import pytest
import torch

from trainkit.bench import __main__ as bench

NAMES = ["lion", "sinkgd", "galore"]
SMALL = ["optimizer", "--scale", "0.01", "--rounds", "1", "--threads", "1", "--set", "optimizer.rank=8", "--optimizers"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_state_is_what_the_papers_claim(capsys):
    assert bench.main([*SMALL, *NAMES, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {result["name"].partition(" ")[0] for result in said["results"]} == set(NAMES)
    for result in said["results"]:
        assert result["matrix_state"] == pytest.approx(result["claim"], rel=0.01)
        assert result["ratio"] == pytest.approx(result["seconds"] / result["reference_seconds"])


def test_the_table_names_the_machine_and_every_optimizer(capsys):
    assert bench.main([*SMALL, *NAMES]) == 0
    said = capsys.readouterr().out
    for word in (*NAMES, "cpu:", "threads: 1", "/ AdamW", "claim", "parameters in float32"):
        assert word in said


def test_an_unknown_name_is_a_mistake(capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main([*SMALL, "lyon"])
    assert caught.value.code == 2
    assert "conf/optimizer has no lyon" in capsys.readouterr().err
