"""What a sweep over learning rates writes: numbers by an independent computation, and pictures of awkward sweeps."""

import csv
import math
import statistics

import pytest
import yaml
from matplotlib.image import imread

from trainkit.report import lr_sensitivity as report
from trainkit.report.lr_sensitivity import curves, write

RATES = [1e-4, 1e-3, 1e-2, 1e-1]


def sweep(folder, losses, data=None, key="optimizer.lr", rates=RATES):
    """Jobs of {(norm, seed): losses by learning rate}; nan: stopped by the guard, None: failed otherwise."""
    jobs = []
    for (norm, seed), row in losses.items():
        for rate, loss in zip(rates, row, strict=True):
            place = folder / str(len(jobs))
            place.mkdir()
            (place / "config.yaml").write_text(yaml.safe_dump({"data": {"vocab": 16} if data is None else data}))
            status = "failed" if loss is None else "diverged" if math.isnan(loss) else "finished"
            metrics = {"val/loss": loss} if status == "finished" else {}
            words = [f"norm={norm}", f"seed={seed}", f"{key}={rate}", "model.depth=2"]
            jobs.append({"overrides": words, "status": status, "metrics": metrics, "dir": str(place)})
    return jobs


def rows(folder):
    with (folder / "lr_sensitivity.csv").open(newline="") as file:
        return list(csv.DictReader(file))


NAN = math.nan
LOSSES = {
    ("pre", 0): [2.5, 2.0, 1.0, NAN],
    ("pre", 1): [2.7, 2.2, 1.4, 2.0],
    ("peri", 0): [2.4, 1.9, 0.9, 1.2],
    ("peri", 1): [2.6, 1.8, 1.1, 1.3],
}


def test_the_numbers(tmp_path):
    table, *lines = write(tmp_path, sweep(tmp_path, LOSSES), "optimizer.lr")
    start = math.log(16)
    found = rows(tmp_path)
    assert [(r["norm"], float(r["lr"])) for r in found] == [(n, rate) for n in ("pre", "peri") for rate in RATES]
    for r in found:
        at = RATES.index(float(r["lr"]))
        values = [row[at] if row[at] < start else start for (norm, _), row in LOSSES.items() if norm == r["norm"]]
        assert float(r["val/loss"]) == pytest.approx(statistics.fmean(values), abs=1e-12)
        assert (float(r["min"]), float(r["max"])) == (min(values), max(values))
        assert r["diverged"] == ("1" if (r["norm"], at) == ("pre", 3) else "0")
        assert (r["seeds"], r["missing"], float(r["loss_at_start"])) == ("2", "0", start)
        assert float(r["best_lr"]) == 1e-2
    # pre, seed 0: (2.5 + 2 + 1 + ln 16) / 4 - 1; seed 1: 8.3 / 4 - 1.4
    pre = ((5.5 + start) / 4 - 1 + 8.3 / 4 - 1.4) / 2
    peri = (6.4 / 4 - 0.9 + 6.8 / 4 - 1.1) / 2
    assert float(found[0]["lr_sensitivity"]) == pytest.approx(pre)
    assert float(found[-1]["lr_sensitivity"]) == pytest.approx(peri)
    text = (tmp_path / "lr_sensitivity.md").read_text()
    assert f"| pre | 0.01 | 1.2000 | 1.0000 to 1.4000 | 1 of 8 | 0 | {pre:.4f} |" in text
    assert "×1" in text
    assert "ln(vocabulary)" in text
    assert table.row_count == 2
    assert lines == [f"figure {tmp_path / 'lr_sensitivity.png'}"]
    assert imread(tmp_path / "lr_sensitivity.png").shape[1] == 1440


def test_a_run_that_ends_no_better_than_it_began_is_bounded_and_counted_apart(tmp_path):
    jobs = sweep(tmp_path, {("pre", 0): [2.0, math.log(16), 5.0, NAN]})
    (curve,) = curves(jobs, "optimizer.lr", [])
    assert [point.diverged for point in curve.points] == [0, 0, 0, 1]
    assert [point.above for point in curve.points] == [0, 1, 1, 0]
    assert [point.mean for point in curve.points] == [2.0, *[math.log(16)] * 3]


def test_classes_count_where_there_is_no_vocabulary(tmp_path):
    (curve,) = curves(sweep(tmp_path, {("pre", 0): [1.0] * 4}, {"classes": 10}), "optimizer.lr", [])
    assert curve.points[0].start == pytest.approx(math.log(10))


def test_a_seed_with_a_failed_job_is_left_out_and_said(tmp_path):
    losses = LOSSES | {("pre", 1): [2.7, None, 1.4, 2.0]}
    _, *lines = write(tmp_path, sweep(tmp_path, losses), "optimizer.lr")
    assert float(rows(tmp_path)[0]["lr_sensitivity"]) == pytest.approx((5.5 + math.log(16)) / 4 - 1)
    assert rows(tmp_path)[1]["missing"] == "1"
    assert "pre: 1 jobs have no final loss; their seeds are left out of LR sensitivity" in lines
    assert "1 of 7" in (tmp_path / "lr_sensitivity.md").read_text()


def test_without_a_known_start_there_is_no_number_and_a_cross_at_the_edge(tmp_path):
    _, *lines = write(tmp_path, sweep(tmp_path, {("pre", 0): [2.0, 1.0, 3.0, NAN]}, {"classes": None}), "optimizer.lr")
    assert any("l0 is not known" in line for line in lines)
    (last,) = (r for r in rows(tmp_path) if float(r["lr"]) == 0.1)
    assert (last["diverged"], last["val/loss"], last["lr_sensitivity"]) == ("1", "", "")
    assert (tmp_path / "lr_sensitivity.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("losses", "rates", "says"),
    [
        ([2.0, 1.5, 1.2, 1.0], RATES, "the best learning rate is at the end of the grid"),
        ([2.0, 1.0, 1.2, 1.3], [1e-4, 1e-3, 2e-3, 1e-1], "not evenly spaced in the logarithm"),
        ([2.0, 1.0, 1.2, 1.3], [1e-4, 3e-4, 1e-3, 3e-3], None),
        ([2.0, 1.0, 1.2, 1.3], [1e-4, 3.2e-4, 1e-3, 3.2e-3], None),
    ],
)
def test_what_is_to_be_known_about_a_grid(tmp_path, losses, rates, says):
    _, *lines = write(tmp_path, sweep(tmp_path, {("pre", 0): losses}, rates=rates), "optimizer.lr")
    notes = [line for line in lines if not line.startswith("figure")]
    assert (says is None) == (not notes)
    assert says is None or says in notes[0]


@pytest.mark.parametrize("loss", [None, NAN])
def test_a_sweep_without_any_loss(tmp_path, loss):
    write(tmp_path, sweep(tmp_path, {("pre", 0): [loss] * 4}), "optimizer.lr")
    assert (tmp_path / "lr_sensitivity.md").is_file()
    assert (tmp_path / "lr_sensitivity.png").is_file() == (loss is not None)
    assert {r["val/loss"] for r in rows(tmp_path)} == ({""} if loss is None else {str(math.log(16))})


def test_jobs_that_never_began(tmp_path):
    jobs = [{"overrides": [f"optimizer.lr={rate}"], "status": "waiting", "seconds": 0.0} for rate in RATES]
    write(tmp_path, jobs, "optimizer.lr")
    assert {r["missing"] for r in rows(tmp_path)} == {"1"}


def test_more_groups_than_colours(tmp_path):
    losses = {(f"n{n}", 0): [2.0, 1.0 + n / 20, 1.2, 1.3] for n in range(len(report.COLOURS) + 2)}
    write(tmp_path, sweep(tmp_path, losses), "optimizer.lr")
    assert len(rows(tmp_path)) == 40
