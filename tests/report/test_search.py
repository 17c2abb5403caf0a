"""What a search writes."""

import csv

import pytest

from trainkit.report.search import best_so_far, write

SEARCH = {"metric": "val/loss", "direction": "minimize", "sampler": "tpe"}


def job(number, value, status="finished"):
    words = ["name=it's", f"optimizer.lr={10.0**-number:g}", "norm=pre"]
    found = {"overrides": words, "params": {"optimizer.lr": 10.0**-number, "norm": "pre"}, "status": status}
    return found | {"metrics": {} if value is None else {"val/loss": value}, "reason": "NonFiniteLoss: nan"}


JOBS = [job(1, 3.0), job(2, None, "diverged"), job(3, 2.0), job(4, float("nan")), job(5, 2.5)]


@pytest.mark.parametrize(
    ("direction", "best", "history"),
    [("minimize", 2, ["3.0", "3.0", "2.0", "2.0", "2.0"]), ("maximize", 0, ["3.0"] * 5)],
)
def test_the_best_is_a_command_line_and_the_history_a_csv(tmp_path, direction, best, history):
    told = write(tmp_path, JOBS, SEARCH | {"direction": direction}, {"norm": 0.2, "optimizer.lr": 0.8})
    command = f"python run.py 'name=it'\"'\"'s' optimizer.lr={10.0 ** -(best + 1):g} norm=pre"
    text = (tmp_path / "search.md").read_text()
    assert f"\n{command}\n" in text
    assert f"  {command}" in told
    assert "- job 1, diverged: NonFiniteLoss: nan" in text
    assert text.index("| optimizer.lr | 0.80 |") < text.index("| norm | 0.20 |")
    with (tmp_path / "search.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["best so far"] for row in rows] == history
    assert [row["val/loss"] for row in rows] == ["3.0", "", "2.0", "", "2.5"]
    assert [row["norm"] for row in rows] == ["pre"] * 5
    assert (tmp_path / "search.png").stat().st_size > 10_000


@pytest.mark.parametrize("jobs", [[], [job(1, None, "failed")]])
def test_a_search_without_a_result(tmp_path, jobs):
    assert write(tmp_path, jobs, SEARCH, {}) == []
    assert "No job has finished with a val/loss that is a number." in (tmp_path / "search.md").read_text()


def test_best_so_far():
    assert best_so_far([None, 2.0, 3.0, None, 1.0], 1) == [None, 2.0, 2.0, 2.0, 1.0]
    assert best_so_far([None, 2.0, 3.0, None, 1.0], -1) == [None, 2.0, 3.0, 3.0, 3.0]
