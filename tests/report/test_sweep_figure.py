"""A metric of a sweep as a picture: its numbers by hand, and what is refused."""

import csv
import json

import pytest
from scipy import stats

from trainkit.report.__main__ import main


@pytest.fixture
def sweep(tmp_path):
    jobs = []
    for number, (norm, seed) in enumerate([("pre", 0), ("pre", 1), ("pre", 2), ("peri", 0)]):
        run = tmp_path / "sweep" / str(number)
        run.mkdir(parents=True)
        rows = [{"step": step, "val/loss": 10.0 / step + seed, "lr": 0.1} for step in (1, 2)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (run / "result.json").write_text(json.dumps({"status": "finished", "metrics": {"val/loss": 1.0}}))
        jobs.append({"overrides": [f"norm={norm}", f"seed={seed}"], "status": "finished"})
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    return tmp_path / "sweep"


def test_a_line_is_the_mean_over_seeds_and_its_interval(sweep, capsys):
    assert main(["figure", str(sweep), "val/loss", "lr", "--log"]) == 0
    picture = sweep / "report" / "val_loss_lr.png"
    assert capsys.readouterr().out.strip() == str(picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with picture.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    first = next(row for row in rows if row["group"] == "norm=pre" and row["metric"] == "val/loss")
    low, high = stats.t.interval(0.95, 2, loc=11.0, scale=stats.sem([10.0, 11.0, 12.0]))
    assert (first["step"], float(first["mean"]), first["runs"]) == ("1", 11.0, "3")
    assert float(first["ci95"]) == pytest.approx((high - low) / 2)
    alone = [row for row in rows if row["group"] == "norm=peri" and row["metric"] == "val/loss"]
    assert [(float(row["mean"]), row["ci95"]) for row in alone] == [(10.0, "nan"), (5.0, "nan")]
    assert {row["metric"] for row in rows} == {"val/loss", "lr"}


@pytest.mark.parametrize(
    ("more", "says"),
    [(["val/los"], "Try val/loss"), (["lr", "--out", "x.pdf"], "Try --out x.png")],
)
def test_what_cannot_be_drawn_is_told(sweep, capsys, more, says):
    assert main(["figure", str(sweep), *more]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    assert main(["figure", str(tmp_path), "lr"]) == 2
    assert "is empty" in capsys.readouterr().err
