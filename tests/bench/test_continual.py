"""The bench of continual learning: every strategy beside none, on a full step of ER-ACE in the second task."""

import argparse
import json

import pytest
import torch

from trainkit.bench import __main__ as bench
from trainkit.bench import continual
from trainkit.bench.timing import interleaved
from trainkit.norm_layer.adab2n import AdaB2N

SMALL = ["--width", "2", "--batch", "4", "--image", "8", "--buffer", "16", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_json_has_every_strategy_but_none(capsys):
    assert bench.main(["continual", *SMALL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["hardware"]["threads"] == 1
    assert "torch" in said["versions"]
    names = [result["name"] for result in said["results"]]
    strategies = ("adab2n", "batch_renorm", "cn", "ghost_bn", "group", "nap", "task_bn")
    assert set(names) >= {f"{strategy} / none, width 2" for strategy in strategies}
    assert "none / none, width 2" not in names
    for result in said["results"]:
        assert result["ratio"] == pytest.approx(result["seconds_a"] / result["seconds_b"])
        for side in "ab":
            assert result[f"samples_per_second_{side}"] == pytest.approx(4 / result[f"seconds_{side}"])


def test_the_table_names_the_machine_and_what_was_compared(capsys):
    assert bench.main(["continual", *SMALL, "--clock", "cpu", "--strategies", "cn"]) == 0
    said = capsys.readouterr().out
    for word in ("cpu:", "threads: 1", "width 2", "(3, 8, 8)", "4 new images", "cpu time", "samples/s", "cn ", "none"):
        assert word in said


def test_a_step_is_one_forward_of_new_and_replayed_images(monkeypatch):
    seen = []

    def noted(self, x):
        seen.append((len(x), self.said.ids.tolist(), int(self.cur_tasks)))
        return forward(self, x)

    forward = AdaB2N.forward
    monkeypatch.setattr(AdaB2N, "forward", noted)
    step = continual.build("adab2n", argparse.Namespace(width=2, batch=4, image=8, buffer=16))
    step()
    assert len(seen) == 20  # one forward of a ResNet-18, whose convolutions are 20
    assert set(map(str, seen)) == {str((8, [1] * 4 + [0] * 4, 1))}


@pytest.mark.parametrize("words", [["--strategies", "nothing"], ["--rounds", "0"], ["--width", "0"]])
def test_mistakes_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(["continual", *words])
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_rounds_are_timed_by_the_clock_that_is_given():
    now = iter(range(100))
    assert interleaved({"a": lambda: next(now), "b": lambda: None}, 3, clock=lambda: next(now)) == {"a": 2, "b": 1}
