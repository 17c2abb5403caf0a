"""Claims: what counts as confirmed, each measure by hand, and that every file of conf says all that is needed."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from trainkit.report import claims, claims_page
from trainkit.report.claim import Claim, arm, judge, measure_of, read
from trainkit.report.collect import Run, Series

CLAIM = Claim(
    name="example",
    claim="b is lower than a",
    source="nobody",
    shown="final validation loss (nats)",
    arms={"a": ["norm=pre"], "b": ["norm=peri"]},
    grid={"optimizer.lr": [0.1, 0.2]},
    seeds=[0, 1, 2],
    measure={"name": "metric", "of": "val/loss"},
    expected={"b": "lower"},
)


def run(loss, lr="0.1", seed=0, status="finished", **series):
    made = Run(f"{lr}/{seed}", Path("nowhere"), status=status, seconds=10.0, metrics={"val/loss": loss})
    made.words = {"optimizer.lr": lr, "seed": str(seed)}
    made.result = {"parameters": 100, "optimizer_state_bytes": 800}
    made.series = {name: Series(np.arange(1, len(v) + 1), np.array(v, float)) for name, v in series.items()}
    return made


def arms(a, b):
    """Losses by seed at the better value of the grid; at the other one all are 9."""
    return {
        name: arm(
            name,
            "optimizer.lr",
            [run(loss, lr, seed) for seed, best in enumerate(values) for lr, loss in (("0.2", best), ("0.1", 9.0))],
        )
        for name, values in {"a": a, "b": b}.items()
    }


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ([3.0, 3.1, 3.2], [2.0, 2.1, 2.25], "confirmed"),
        ([2.0, 2.1, 2.25], [3.0, 3.1, 3.2], "not confirmed"),
        ([3.0, 3.1, 3.2], [2.0, 3.5, 3.2], "inconclusive"),
    ],
)
def test_the_verdict_follows_from_the_paired_interval(a, b, verdict):
    outcome = judge(CLAIM, arms(a, b))
    assert outcome.verdict == verdict
    mean, width = outcome.differences["b"]
    apart = np.subtract(b, a)
    low, high = stats.t.interval(0.95, 2, loc=apart.mean(), scale=stats.sem(apart))
    assert (mean - width, mean + width) == pytest.approx((low, high))
    assert outcome.arms["b"]["optimizer.lr"] == "0.2"


def test_every_expected_arm_has_to_be_on_its_side():
    three = replace(CLAIM, arms={**CLAIM.arms, "c": []}, expected={"b": "lower", "c": "lower"})
    found = arms([3.0, 3.1, 3.2], [2.0, 2.1, 2.25])
    worse = arms([3.0, 3.1, 3.2], [4.0, 4.1, 4.25])["b"]
    assert judge(three, {**found, "c": replace(worse, name="c")}).verdict == "not confirmed"
    unclear = arms([3.0, 3.1, 3.2], [2.0, 3.5, 3.2])["b"]
    assert judge(three, {**found, "c": replace(unclear, name="c")}).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("b", "verdict"),
    [([3.001, 3.1, 3.2], "confirmed"), ([3.5, 3.6, 3.71], "not confirmed"), ([2.8, 3.2, 3.2], "inconclusive")],
)
def test_the_same_is_within_a_margin(b, verdict):
    same = replace(CLAIM, expected={"b": "same"}, margin=0.05)
    assert judge(same, arms([3.0, 3.1, 3.2], b)).verdict == verdict


def test_no_higher_may_be_lower():
    kind = replace(CLAIM, expected={"b": "no higher"}, margin=0.05)
    assert judge(kind, arms([3.0, 3.1, 3.2], [2.0, 2.1, 2.25])).verdict == "confirmed"
    assert judge(kind, arms([3.0, 3.1, 3.2], [3.3, 3.4, 3.51])).verdict == "not confirmed"


def test_arms_may_be_looked_at_with_one_value_for_all():
    found = arms([3.0, 3.1, 3.2], [2.0, 2.1, 2.25])
    found["b"] = replace(found["b"], best="0.1")
    assert judge(CLAIM, found).arms["b"]["optimizer.lr"] == "0.1"
    outcome = judge(replace(CLAIM, common=True), found)
    assert [row["optimizer.lr"] for row in outcome.arms.values()] == ["0.2", "0.2"]
    assert outcome.verdict == "confirmed"


def test_an_arm_whose_runs_failed_is_not_judged_by_the_others():
    found = arms([3.0, 3.1, 3.2], [2.0, 2.1, 2.2])
    found["b"].runs["0.2", 1].status = "failed"  # its loss is no loss, so the other value of the grid is the best
    again = arm("b", "optimizer.lr", list(found["b"].runs.values()))
    assert again.best == "0.1"
    outcome = judge(CLAIM, {**found, "b": again})
    assert outcome.arms["b"]["failed"] == 1
    lost = [run(math.nan, "0.1", s, "failed", **{"val/loss": [2.5, 2.5]}) for s in range(3)]
    gone = arm("b", "optimizer.lr", lost)  # and what was logged on the way does not count
    outcome = judge(CLAIM, {**found, "b": gone})
    assert outcome.verdict == "inconclusive"
    assert outcome.arms["b"]["loss"] is None


def test_measures_by_hand():
    blocks = {f"grad_norm/blocks.{n}": [10.0, v] for n, v in enumerate([1.0, 2.0, 2.0, 4.0, 1.0, 8.0])}
    made = run(1.0, **{"train/loss": [8.0, 4.0, 2.0], "val/loss": [3.0, 2.0, 1.0], "rate": [4.0, 2.0]}, **blocks)
    other = run(3.0, "0.2", **{"val/loss": [3.0, 2.5, 2.0]})
    one = arm("a", "optimizer.lr", [made, other])
    first = arm("f", "optimizer.lr", [run(2.0)])

    def value(name, **settings):
        return measure_of({"name": name, **settings})(one, 0, first)

    assert value("metric", of="val/loss") == 1.0
    assert value("metric", of="train/loss") == 2.0
    assert value("growth", of="rate") == 0.5
    assert value("state") == 8.0
    assert value("seconds") == 10.0
    assert value("over_depth", of="grad_norm") == 8.0
    assert value("over_depth", of="grad_norm", at="first") == 1.0
    assert value("share_of_top", of="grad_norm") == pytest.approx((16 + 1 + 64) / (1 + 4 + 4 + 16 + 1 + 64))
    assert value("late_blocks", of="grad_norm", share=1 / 3) == 4.5
    assert value("unevenness", of="grad_norm") == pytest.approx(np.std([1, 2, 2, 4, 1, 8]) / 3)
    assert value("spread", cap=2.0) == pytest.approx((1.0 + 2.0) / 2 - 1.0)
    assert value("failures", above=2.0) == 0.5
    assert value("steps_to") == pytest.approx(2 / 3)
    assert measure_of({"name": "steps_to"})(one, 0, arm("f", "optimizer.lr", [run(0.5)])) == 2
    assert math.isnan(measure_of({"name": "steps_to"})(one, 0, arm("f", "optimizer.lr", [run(2.0, status="failed")])))
    assert math.isnan(value("metric", of="nothing"))
    assert math.isnan(value("over_depth", of="nothing"))


def test_every_claim_of_conf_is_whole():
    files = sorted(claims.FOLDER.glob("*.yaml"))
    assert len(files) > 10
    for file in files:
        found = read(file)
        assert len(found.arms) > 1
        for name in found.arms:
            assert claims.words(found, name, Path("runs"))[0] == f"experiment=claims/{found.home}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seeds": [0, 1]}, "at least 3 seeds"),
        ({"grid": {}}, "one key"),
        ({"expected": {"c": "lower"}}, "compared with a"),
        ({"expected": {"b": "less"}}, "lower, higher, same, no higher"),
        ({"expected": {"b": "same"}}, "margin"),
        ({"measure": {"name": "magic"}}, "got 'magic'"),
    ],
)
def test_what_a_claim_lacks_is_said(change, says):
    with pytest.raises(ValueError, match=says):
        replace(CLAIM, **change)


def test_the_page_shows_every_number_and_names_what_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(claims_page, "DOCS", tmp_path)
    found = arms([3.0, 3.1, 3.2], [2.0, 2.1, 2.25])
    claims.keep(CLAIM, judge(CLAIM, found), found, tmp_path / "claims" / "example.json")
    text = claims_page.page(["example", "later"])
    assert "✓ confirmed" in text
    assert "| `norm=peri` | 0.2 (edge) |" in text
    assert "Not measured yet: `later`." in text


def test_names_that_are_none_are_told(capsys):
    assert claims.main(["nonsense"]) == 2
    assert "no such claim: nonsense" in capsys.readouterr().err


def test_runs_of_another_claim_are_not_taken_for_it(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(claims.subprocess, "run", lambda command, **_: started.append(command))
    found = read(claims.FOLDER / "muon_steps.yaml")
    found = replace(found, arms={name: found.arms[name] for name in ("adamw", "muon")}, expected={"muon": "lower"})
    claims.run(found, tmp_path, 1)
    assert [word for word in started[0] if word.startswith("optimizer=")] == ["optimizer=adamw"]
    assert len(started) == 2
    for name in found.arms:
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text('{"jobs": [{"status": "finished"}]}')
    claims.run(found, tmp_path, 1)
    assert len(started) == 2
    with pytest.raises(ValueError, match="has changed since its runs"):
        claims.run(replace(found, seeds=[0, 1, 2, 3]), tmp_path, 1)


def test_only_what_ended_or_diverged_is_a_result(tmp_path):
    for name in CLAIM.arms:
        jobs = [
            {"overrides": [f"optimizer.lr={lr}", f"seed={seed}"], "status": "finished"}
            for lr in (0.1, 0.2)
            for seed in CLAIM.seeds
        ]
        for number in range(6):
            (tmp_path / name / str(number)).mkdir(parents=True)
            (tmp_path / name / str(number) / "result.json").write_text('{"status": "finished"}')
        (tmp_path / name / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    assert claims.gather(CLAIM, tmp_path) is not None
    last = tmp_path / "b" / "5" / "result.json"
    for reason, counts in (("NonFiniteLoss: at step 3", True), ("OSError: the disk is full", False)):
        last.write_text(json.dumps({"status": "failed", "reason": reason}))
        jobs[5]["status"] = "failed"
        (tmp_path / "b" / "sweep.json").write_text(json.dumps({"jobs": jobs}))
        assert (claims.gather(CLAIM, tmp_path) is not None) == counts


@pytest.mark.slow
def test_a_claim_is_run_judged_and_not_run_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["trainer.max_steps=2", "model.depth=1", "data.val_batches=1", "callbacks=none"]
    of = {name: [f"optimizer={name}", *short] for name in ("adamw", "sinkgd")}
    found = replace(read(claims.FOLDER / "sinkgd_memory.yaml"), arms=of, grid={"optimizer.lr": [0.01]})
    claims.run(found, Path("runs"), 2)
    arms = claims.gather(found, Path("runs"))
    assert arms is not None
    outcome = judge(found, arms)
    assert outcome.verdict == "confirmed"
    assert outcome.arms["sinkgd"]["optimizer_state_bytes"] < outcome.arms["adamw"]["optimizer_state_bytes"]
    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("result.json")}
    assert len(before) == 6
    claims.run(found, Path("runs"), 2)
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("result.json")} == before
