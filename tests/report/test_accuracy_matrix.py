"""The heat map of a stream's accuracies, and the curves of weights, from plain files."""

import csv
import math
from pathlib import Path

import pytest
from PIL import Image

from trainkit.report import accuracy_matrix, plasticity
from trainkit.report.figures import draw
from trainkit.report.metrics_file import line


def write(folder: Path, R: list[list[float | None]]) -> Path:
    """As a run writes it."""
    path = folder / "accuracy_matrix.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trained", *(f"task_{k}" for k in range(len(R)))])
        writer.writerows([t, *("" if v is None else repr(v) for v in row)] for t, row in enumerate(R))
    (folder / "metrics.jsonl").touch()
    return path


def lower(tasks: int) -> list[list[float | None]]:
    return [[1 - (t - k) / (tasks + 1) if k <= t else None for k in range(tasks)] for t in range(tasks)]


@pytest.mark.parametrize("tasks", [1, 5, 12, 25])
def test_a_matrix_is_pictured_with_its_numbers(tmp_path, tasks):
    R = lower(tasks)
    write(tmp_path, R)
    (picture,) = draw(tmp_path / "metrics.jsonl", tmp_path / "figures", title="toy")
    assert picture.name == "accuracy_matrix.png"
    with Image.open(picture) as image:
        image.verify()
    with picture.with_suffix(".csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    for t, row in enumerate(found):
        assert row["trained"] == str(t)
        assert [float(row[f"task_{k}"]) if row[f"task_{k}"] else None for k in range(tasks)] == R[t]
        seen = [v for v in R[t][: t + 1] if v is not None]
        assert float(row["mean_of_seen"]) == pytest.approx(sum(seen) / len(seen))


def test_a_stream_that_was_broken_off_and_a_joint_one(tmp_path):
    broken: list[list[float | None]] = [[0.9, None, None], [0.5, 0.7, None], [None] * 3]
    joint: list[list[float | None]] = [[None] * 3, [None] * 3, [0.9, 0.8, 0.7]]
    nothing: list[list[float | None]] = [[None] * 3] * 3
    for R in (broken, joint, nothing):
        write(tmp_path, R)
        assert len(draw(tmp_path / "metrics.jsonl", tmp_path / "figures")) == 1


def test_a_file_that_is_no_matrix_is_refused(tmp_path):
    path = write(tmp_path, [[0.5, 0.5]])
    with pytest.raises(ValueError, match="as many rows as columns"):
        accuracy_matrix.read(path)
    path.write_text("trained,task_0\n0,good\n")
    with pytest.raises(ValueError, match="no matrix"):
        accuracy_matrix.read(path)
    path.write_text("")
    with pytest.raises(ValueError, match="as many rows as columns"):
        accuracy_matrix.read(path)


@pytest.mark.parametrize("layers", [1, 4, 21])
def test_weights_that_have_no_logarithm_are_drawn_all_the_same(tmp_path, layers):
    rows = [
        {"step": step, **{f"{kind}/l{n}": 1.0 + n for kind in ("weight_norm", "effective_lr") for n in range(layers)}}
        for step in (1, 10, 20)
    ]
    rows[1] |= {"weight_norm/l0": 0.0, "effective_lr/l0": math.inf}
    rows[2] |= {"weight_norm/l0": math.nan, "train/loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(map(line, rows)))
    names = [path.stem for path in draw(tmp_path / "metrics.jsonl", tmp_path / "figures")]
    assert names == ["loss", "weights"]
    with (tmp_path / "figures" / "weights.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["weight_norm/l0"] for row in found] == ["1.0", "0.0", "nan"]


def test_weights_without_any_rate_are_one_panel(tmp_path):
    rows = [{"step": step, "weight_norm/a": 2.0} for step in (1, 2)]
    assert plasticity.collect(rows) == {"weight_norm": ["a"]}
    plasticity.weights({"weight_norm": ["a"]}, rows, tmp_path, "toy")
    assert (tmp_path / "weights.png").is_file()
    assert plasticity.collect([{"step": 1, "weight_norm/mean": 2.0}]) is None
