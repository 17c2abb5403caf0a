"""What callbacks.activations logs, when, and that it leaves no trace in the run."""

import csv
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from callbacks.activations import Activations
from tests.callbacks.test_plasticity import Normalized
from tests.callbacks.toy import WIDTH, Batches, Toy, fit, rows
from trainkit.measure.look import inspect


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_looks_at_the_first_step_every_so_often_and_at_the_last(tmp_path, accumulate):
    fit(tmp_path, [Activations(every=5)], accumulate_grad_batches=accumulate)
    logged = rows(tmp_path, "hidden_variance/blocks.1")
    assert [row["step"] for row in logged] == [1, 5, 10, 12]
    for row in logged:
        assert {"hidden_max/embed", "deletion_drop/blocks.0", "block_influence/blocks.1", "logit_rms"} <= set(row)


def test_the_numbers_are_those_of_the_probe(tmp_path):
    _, task = fit(tmp_path, [Activations(every=12, samples=16)])
    seen = inspect(task, list(Batches(2)))
    row = rows(tmp_path, "hidden_variance/blocks.1")[-1]
    for name, value in (seen.means | seen.maxima).items():
        assert row[name] == pytest.approx(float(value), rel=1e-5, abs=1e-7)
    with (tmp_path / "angular_distance.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["layer", "embed", "blocks.0", "blocks.1"]
    assert [line[0] for line in lines] == header[1:]
    found = torch.tensor([[float(cell) for cell in line[1:]] for line in lines], dtype=torch.float64)
    assert torch.allclose(found, seen.distances)


def test_a_run_is_the_same_with_it_and_without(tmp_path):
    drawn = []

    class Draws(Callback):
        def on_train_batch_end(self, *_):
            drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))

    states = []
    for name, callbacks in (("with", [Activations(every=2)]), ("without", [])):
        random.seed(0)
        np.random.seed(0)
        (tmp_path / name).mkdir()
        _, task = fit(tmp_path / name, [*callbacks, Draws()], task=Normalized())
        assert bool(rows(tmp_path / name, "hidden_variance/blocks.0")) == bool(callbacks)
        states.append((task.state_dict(), [m.training for m in task.modules()]))
    assert all(torch.equal(value, states[1][0][name]) for name, value in states[0][0].items())
    assert states[0][1] == states[1][1]
    assert drawn[: len(drawn) // 2] == drawn[len(drawn) // 2 :]


def test_what_a_network_does_not_have_is_said_once(tmp_path, said):
    task = Toy()
    task.model = nn.Linear(WIDTH, 1)
    fit(tmp_path, [Activations(every=2)], task=task)
    assert len([line for line in said if "no `blocks`" in line]) == 1
    assert len(rows(tmp_path, "logit_rms")) == 7
    assert not (tmp_path / "angular_distance.csv").exists()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"every": 0}, "every must be at least 1"), ({"samples": 0}, "samples"), ({"tokens": "first"}, "all or last")],
)
def test_settings_that_make_no_sense(wrong, named):
    with pytest.raises(ValueError, match=rf"callbacks\.activations\..*{named}"):
        Activations(**wrong)
