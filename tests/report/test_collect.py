"""Whatever state directories are in, what can be read is shown and the rest is listed with the reason."""

import json

import numpy as np
import pytest

from tests.report import synthetic
from trainkit.report import page
from trainkit.report.collect import Run, collect, gather


def by_name(found) -> dict[str, Run]:
    return {run.name: run for run in found.runs}


def test_a_sweep_is_read_as_it_was_written(tmp_path):
    found = collect(synthetic.sweep(tmp_path, {"norm": ["pre", "peri"], "seed": [0, 1]}))
    assert [run.words for run in found.runs] == [{"norm": n, "seed": s} for n in ("pre", "peri") for s in "01"]
    assert found.left_out == []
    run = found.runs[1]
    assert (run.status, run.seconds, run.reason, run.remarks) == ("finished", 61.0, "", [])
    assert run.config == {"seed": "1", "choices.norm": "pre", "trainer.threads": "1"}
    assert run.series["train/loss"].steps.tolist() == list(range(1, 21))
    assert run.series["val/loss"].steps.tolist() == list(range(2, 21, 2))
    assert run.metrics["val/loss"] == 2.01


def damage(name: str, sweep) -> None:
    """Does to run 1 of a sweep what its name says."""
    run = sweep / "1"
    if name == "empty directory":
        for file in run.iterdir():
            file.unlink()
    elif name == "missing directory":
        for file in run.iterdir():
            file.unlink()
        run.rmdir()
    elif name == "empty metrics":
        (run / "metrics.jsonl").write_text("")
    elif name == "no metrics":
        (run / "metrics.jsonl").unlink()
    elif name == "binary metrics":
        (run / "metrics.jsonl").write_bytes(bytes(range(256)) * 40)
    elif name == "torn metrics":
        text = (run / "metrics.jsonl").read_text().splitlines()
        (run / "metrics.jsonl").write_text("\n".join([text[0], text[1][:30], *text[2:]]))
    elif name == "deep metrics":
        (run / "metrics.jsonl").write_text('{"step": 1, "a": ' + "[" * 100_000 + "\n")
    elif name == "odd values":
        odd = {"step": 1, "train/loss": "x", "a": [1], "b": {"c": 1}, "d": None, "e": True, "f": 10**400, "g": 1.0}
        (run / "metrics.jsonl").write_text(json.dumps(odd) + "\n" + json.dumps({"step": 10**30, "g": 2.0}))
    elif name == "corrupt result":
        (run / "result.json").write_text("{")
    elif name == "result of odd types":
        odd = {"status": ["finished"], "metrics": [1], "overrides": 3, "seconds": "x", "versions": 1, "parameters": "n"}
        (run / "result.json").write_text(json.dumps(odd))
    elif name == "corrupt config":
        (run / "config.yaml").write_text("a: [1\nb: }")
    elif name == "config that would run code":
        (run / "config.yaml").write_text("a: !!python/object/apply:os.system ['touch " + str(sweep / "ran") + "']")
    elif name == "config of itself":
        (run / "config.yaml").write_text("a: &a\n  b: *a\n  c: 1\n")
    elif name == "config as a list":
        (run / "config.yaml").write_text("- 1\n")
    elif name == "corrupt accuracies":
        (run / "accuracy_matrix.csv").write_text("trained,task_0\n0,much\n")
    elif name == "half characters":
        (run / "result.json").write_text('{"status": "failed", "reason": "\\ud800", "overrides": ["norm=\\udfff"]}')
    elif name == "files as folders":
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").mkdir()


DAMAGES = {
    "empty directory": "no curves: its directory is empty",
    "missing directory": "no curves: its directory is missing",
    "empty metrics": "no curves: metrics.jsonl is empty",
    "no metrics": "no curves: there is no metrics.jsonl",
    "binary metrics": "no curves: no line of metrics.jsonl can be read",
    "torn metrics": "1 of 20 lines of metrics.jsonl cannot be read",
    "deep metrics": "metrics cannot be read (RecursionError",
    "odd values": "",
    "corrupt result": "result.json is damaged",
    "result of odd types": "",
    "corrupt config": "config cannot be read (",
    "config that would run code": "config cannot be read (ConstructorError",
    "config of itself": "",
    "config as a list": "config.yaml is damaged",
    "corrupt accuracies": "matrix cannot be read (ValueError",
    "half characters": "",
    "files as folders": "no curves: there is no metrics.jsonl",
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_told_and_the_others_are_shown(tmp_path, name):
    sweep = synthetic.sweep(tmp_path / "sweep", {"norm": ["pre", "peri", "post"]})
    damage(name, sweep)
    runs = by_name(collect(sweep))
    assert list(runs) == ["0", "1", "2"]
    assert runs["0"].series
    assert runs["2"].series
    assert runs["0"].remarks == runs["2"].remarks == []
    told = " ".join(runs["1"].remarks)
    assert DAMAGES[name] in told if DAMAGES[name] else told == ""
    written = page.of_directory(sweep).read_text()
    assert told.split("(")[0].strip() in written
    assert not (sweep / "ran").exists()


def test_odd_values_are_left_out_and_the_others_kept(tmp_path):
    sweep = synthetic.sweep(tmp_path, {"norm": ["pre", "peri"]})
    damage("odd values", sweep)
    run = by_name(collect(sweep))["1"]
    assert set(run.series) == {"g"}
    assert run.series["g"].values.tolist() == [1.0]


@pytest.mark.parametrize("record", ["{", "[]", '{"jobs": 3}', '{"jobs": [1, null, {"overrides": 7}]}', None])
def test_a_damaged_record_of_the_sweep_leaves_the_numbered_folders(tmp_path, record):
    sweep = synthetic.sweep(tmp_path, {"norm": ["pre", "peri", "post"]})
    (sweep / "sweep.json").unlink()
    if record is not None:
        (sweep / "sweep.json").write_text(record)
    found = collect(sweep)
    assert [run.words for run in found.runs] == [{"norm": name} for name in ("pre", "peri", "post")]
    assert all(run.series for run in found.runs)
    assert page.of_directory(sweep).is_file()


def test_what_is_no_run_is_listed_with_the_reason(tmp_path):
    sweep = synthetic.sweep(tmp_path, {"norm": ["pre", "peri"]})
    (sweep / "notes.txt").write_text("mine")
    (sweep / "7").mkdir()
    (sweep / "plots").mkdir()
    (sweep / "plots" / "a.png").write_bytes(b"")
    for known in ("summary.csv", "summary.md", "report.html", "lr_sensitivity.png", ".lock"):
        (sweep / known).write_text("")
    found = collect(sweep)
    assert [run.name for run in found.runs] == ["0", "1"]
    assert found.left_out == [
        ("7", "an empty folder"),
        ("notes.txt", "a file that is no part of a sweep"),
        ("plots", "a folder without result.json, config.yaml or metrics.jsonl"),
    ]
    text = page.of_directory(sweep).read_text()
    assert "notes.txt" in text
    assert "3 things could not be shown" in text


def test_jobs_that_wait_run_or_failed_say_so(tmp_path):
    sweep = synthetic.sweep(tmp_path, {"norm": ["pre", "peri", "post", "mix"]})
    record = json.loads((sweep / "sweep.json").read_text())
    record["jobs"][1] |= {"status": "failed", "reason": "NonFiniteLoss: the loss is nan", "metrics": {}}
    record["jobs"][2] |= {"status": "running"}
    synthetic.run(sweep / "1", ["norm=peri"], status="failed", reason="the loss is nan")
    synthetic.run(sweep / "2", ["norm=post"], status="running")
    record["jobs"].append({"overrides": ["norm=lns"], "status": "waiting", "seconds": 0.0})
    (sweep / "sweep.json").write_text(json.dumps(record))
    runs = by_name(collect(sweep))
    assert [(run.status, run.reason) for run in runs.values()] == [
        ("finished", ""),
        ("failed", "NonFiniteLoss: the loss is nan"),
        ("running", "had not ended when this was written"),
        ("finished", ""),
        ("waiting", "not started"),
    ]
    assert runs["1"].series
    assert runs["4"].remarks == []
    text = page.of_directory(sweep).read_text()
    assert "NonFiniteLoss: the loss is nan" in text
    assert "1 run did not finish" in text


WAITING = [{"overrides": ["norm=pre"], "status": "waiting", "seconds": 0.0}]


@pytest.mark.parametrize(("jobs", "told"), [([], "There are no runs here."), (WAITING, "No run has finished")])
def test_a_sweep_without_a_run_has_a_report(tmp_path, jobs, told):
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    text = page.of_directory(tmp_path).read_text()
    assert told in text[: text.index("<nav")]


def test_one_run_alone_and_a_run_that_has_only_just_begun(tmp_path):
    one = synthetic.run(tmp_path / "a", ["norm=pre"], steps=1)
    assert [run.name for run in collect(one).runs] == ["a"]
    assert page.of_directory(one) == one / "report.html"
    begun = tmp_path / "b"
    begun.mkdir()
    (begun / "config.yaml").write_text("seed: 0\n")
    (run,) = collect(begun).runs
    assert (run.status, run.reason) == ("unknown", "no result.json says how it ended")
    assert page.of_directory(begun).is_file()


def test_a_directory_that_is_none_is_refused_in_a_sentence(tmp_path, capsys):
    assert page.main([str(tmp_path / "nowhere")]) == 2
    assert "is no directory. Give that of a sweep or of a run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert page.main([str(tmp_path / "empty")]) == 2
    assert "is empty. Give the directory of a sweep" in capsys.readouterr().err
    assert page.main(["compare", str(tmp_path / "empty"), str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.endswith("x: no such directory\n")


def test_runs_started_one_by_one_are_compared_by_what_their_configuration_says(tmp_path):
    runs = [
        synthetic.run(tmp_path / "a", ["paths.log_dir=x"]),
        synthetic.run(tmp_path / "b", ["norm=peri", "seed=1", "paths.log_dir=y", "model=gpt"]),
    ]
    first, second = gather(runs).runs
    assert first.words == {"norm": "pre", "seed": "0", "model": ""}
    assert second.words == {"norm": "peri", "seed": "1", "model": "gpt"}


def test_comparing_takes_runs_and_sweeps_once_each_and_lists_the_rest(tmp_path):
    sweep = synthetic.sweep(tmp_path / "s", {"norm": ["pre", "peri"]})
    run = synthetic.run(tmp_path / "r", ["norm=post"])
    (tmp_path / "empty").mkdir()
    found = gather([run, sweep, sweep / "0", tmp_path / "empty"])
    assert [run.name for run in found.runs] == ["r", "s/0", "s/1"]
    assert [reason.split(".")[0] for _, reason in found.left_out] == [
        "was given before",
        f"{str(tmp_path / 'empty')!r} is empty",
    ]


def test_of_a_step_that_was_logged_twice_the_last_value_holds(tmp_path):
    run = synthetic.run(tmp_path / "a", [])
    rows = [{"step": 2, "x": 1.0}, {"step": 1, "x": 5.0}, {"step": 2, "x": 3.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    series = collect(run).runs[0].series["x"]
    np.testing.assert_array_equal(series.steps, [1, 2])
    np.testing.assert_array_equal(series.values, [5.0, 3.0])
