"""The pictures of callbacks=diagnostics: they are there, and their numbers are the metrics'."""

import csv
import math

import numpy as np
import pytest

from callbacks.activations import Activations
from callbacks.figures import Figures
from callbacks.learning_rate import LearningRate
from tests.callbacks.toy import fit, rows
from tests.report.test_figures import is_picture, table, write
from trainkit.report import angular_distance
from trainkit.report.by_block import collect
from trainkit.report.figures import draw

KINDS = ("hidden_variance", "hidden_max", "deletion_drop", "block_influence")


def looked(steps=(1, 50, 100), blocks=12):
    """Rows as callbacks.activations logs them; hidden states grow with depth."""
    made = []
    for step in steps:
        row = {"step": step, "hidden_variance/embed": 0.1, "hidden_max/embed": 1.0}
        for b in range(blocks):
            row |= {f"{kind}/blocks.{b}": (b + 1) * step * 0.01 + k for k, kind in enumerate(KINDS)}
        made.append(row)
    return made


def test_each_picture_has_its_numbers(tmp_path):
    made = [{"step": s, "lr": 1e-3 / s} for s in (1, 2, 3)] + looked()
    pictures = draw(write(tmp_path, made), tmp_path / "figures", title="toy · norm=pre")
    assert sorted(path.stem for path in pictures) == ["deletion", "hidden_variance", "learning_rate"]
    assert all(map(is_picture, pictures))
    rates = table(tmp_path / "figures" / "learning_rate.csv")
    assert [(int(r["step"]), float(r["lr"])) for r in rates] == [(r["step"], r["lr"]) for r in made[:3]]
    for name, kinds in (("hidden_variance", KINDS[:2]), ("deletion", KINDS[2:])):
        found = table(tmp_path / "figures" / f"{name}.csv")
        for line, row in zip(found, made[3:], strict=True):
            expected = {key: value for key, value in row.items() if key == "step" or key.startswith(kinds)}
            assert {key: float(value) for key, value in line.items()} == expected


def test_blocks_are_in_the_order_of_the_network():
    found = collect(looked(), "hidden_variance")
    assert found.places == ["embed", *(f"blocks.{b}" for b in range(12))]
    assert found.names() == ["embed", *map(str, range(12))]
    assert found.values.shape == (13, 3)
    assert found.values[3, 1] == 3 * 50 * 0.01
    assert collect([{"step": 1, "hidden_variance/embed": 1.0}], "hidden_variance") is None
    assert collect([{"step": 1, "block_influence/blocks.0": 1.0}], "deletion_drop") is None


def test_rates_by_role_are_drawn_apart(tmp_path):
    made = [{"step": s, "lr": 0.1, "lr/head": 0.1, "lr/matrix": 0.2} for s in (1, 2)]
    (picture,) = draw(write(tmp_path, made), tmp_path / "figures")
    assert picture.name == "learning_rate.png"
    assert list(table(tmp_path / "figures" / "learning_rate.csv")[0]) == ["step", "lr", "lr/head", "lr/matrix"]


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan, math.inf])
def test_one_look_one_block_and_numbers_without_a_logarithm(tmp_path, value):
    made = [{"step": 1} | {f"{kind}/blocks.0": value for kind in KINDS}]
    assert [path.stem for path in draw(write(tmp_path, made), tmp_path / "figures")] == ["hidden_variance", "deletion"]


def matrix(path, count, value=None):
    names = ["embed", *(f"blocks.{n}" for n in range(count - 1))]
    D = (
        np.abs(np.subtract.outer(np.arange(count), np.arange(count))) / 40
        if value is None
        else np.full([count] * 2, value)
    )
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["layer", *names], *([n, *row] for n, row in zip(names, D.tolist(), strict=True))])
    return names, D


@pytest.mark.parametrize(("count", "value"), [(2, None), (7, None), (33, None), (4, 0.0), (4, math.nan)])
def test_the_angles_of_any_number_of_layers(tmp_path, count, value):
    names, D = matrix(tmp_path / "angular_distance.csv", count, value)
    (picture,) = draw(write(tmp_path, []), tmp_path / "figures")
    assert is_picture(picture)
    layers, found = angular_distance.read(tmp_path / "figures" / "angular_distance.csv")
    assert layers == names
    np.testing.assert_array_equal(found, D)


@pytest.mark.parametrize("text", ["", "layer,a,b\na,0,1\n", "layer,a\na,wide\n", "layer\n"])
def test_a_file_that_is_no_matrix_is_said_to_be_none(tmp_path, text):
    path = tmp_path / "angular_distance.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"angular_distance\.csv .*Delete it"):
        angular_distance.read(path)


def test_a_run_ends_with_them(tmp_path):
    fit(tmp_path, [Activations(every=6), LearningRate(), Figures(title="toy")])
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.png")}
    assert drawn == {"angular_distance", "deletion", "hidden_variance", "learning_rate", "loss"}
    logged = rows(tmp_path, "hidden_variance/blocks.1")
    found = table(tmp_path / "figures" / "hidden_variance.csv")
    assert [float(line["hidden_variance/blocks.1"]) for line in found] == [
        row["hidden_variance/blocks.1"] for row in logged
    ]
