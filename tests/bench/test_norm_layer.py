"""The bench of norm layers says what it compared, in a table or as one JSON object."""

import json

import pytest
import torch

from trainkit.bench import __main__ as bench
from trainkit.bench.timing import interleaved, kept_bytes, peak_bytes
from trainkit.norm_layer.rms import RMSNorm

SMALL = ["norm_layer", "--quick", "--shape", "2", "8", "32", "--layers", "rms", "power", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_json_is_one_object_with_every_comparison(capsys):
    assert bench.main([*SMALL, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["hardware"]["threads"] == 1
    assert said["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in said["versions"]["torch"]
    names = {result["name"] for result in said["results"]}
    layers, references = ("rms", "power"), ("LayerNorm", "rms_norm")
    titles = ("eager, float32", "eager, bfloat16")
    assert names == {f"{layer} / {ref}, {title}" for layer in layers for ref in references for title in titles}
    for result in said["results"]:
        assert result["ratio"] == pytest.approx(result["seconds_a"] / result["seconds_b"])
        assert result["seconds_a"] > 0


def test_the_table_names_machine_versions_and_layers(capsys):
    assert bench.main(SMALL) == 0
    said = capsys.readouterr().out
    for word in ("cpu:", "threads: 1", "date:", "torch:", "(2, 8, 32)", "eager, bfloat16", "power", "/ LayerNorm"):
        assert word in said


def test_benches_are_listed(capsys):
    assert bench.main([]) == 0
    said = capsys.readouterr().out
    assert "norm_layer  Time and memory" in said
    assert "timing" not in said
    assert bench.main(["nothing"]) == 2


@pytest.mark.parametrize("words", [["--layers", "nothing"], ["--rounds", "0"], ["--shape", "2", "0"]])
def test_mistakes_end_in_one_line(words, capsys):
    with pytest.raises(SystemExit):
        bench.main(["norm_layer", *words])
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_memory_counts_what_is_held():
    size = 4 * 1000
    assert peak_bytes(lambda: torch.ones(1000) + torch.ones(1000)) == pytest.approx(3 * size, rel=0.1)
    x = torch.ones(4, 250, requires_grad=True)
    assert kept_bytes(RMSNorm(250), x) == size
    assert kept_bytes(torch.nn.Identity(), x) == 0


def test_a_round_runs_each_step_once():
    order = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}
