"""The page holds what the runs logged, says how sure its numbers are, and is as safe as it is small."""

import base64
import csv
import json
import math
import re
import statistics
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.report import synthetic
from trainkit.report import blocks, curves, page
from trainkit.report.canvas import Canvas
from trainkit.report.collect import Series, collect, gather
from trainkit.report.findings import config_differences, find
from trainkit.report.metrics_file import line, read

ROOT = Path(__file__).parents[2]
WORDS = {"norm": ["pre", "peri", "post"], "seed": [0, 1, 2]}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def embedded(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


class Parsed(HTMLParser):
    """The elements of a page as a browser sees them: tags with attributes, and the text outside of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text, self.inside = "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.text += data


# --- what is said --------------------------------------------------------------------------------------------------


def test_means_and_intervals_over_seeds_are_students(tmp_path):
    found = find(collect(synthetic.sweep(tmp_path, WORDS)).runs)
    (lines,) = [curves.lines(found.groups, "train/loss")]
    for group, one in zip(found.groups, lines, strict=True):
        values = np.array([run.series["train/loss"].values for run in group.runs])
        low, high = stats.t.interval(0.95, 2, loc=values.mean(0), scale=stats.sem(values, axis=0))
        np.testing.assert_allclose(one.mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(one.mean - one.half, low, rtol=1e-9)
        np.testing.assert_allclose(one.mean + one.half, high, rtol=1e-9)
        assert set(one.runs) == {3}


def test_a_value_that_is_missing_or_not_finite_leaves_the_others_mean(tmp_path):
    values = np.array([[1.0, 2.0, np.nan, 4.0], [3.0, np.inf, np.nan, 6.0], [8.0, 4.0, np.nan, np.nan]])
    mean, half, count = curves.over_runs(values)
    np.testing.assert_allclose(mean, [4.0, 3.0, np.nan, 5.0])
    assert count.tolist() == [3, 2, 0, 2]
    for column, known in ((0, [1, 3, 8]), (1, [2, 4]), (3, [4, 6])):
        n = len(known)
        expected = stats.t.ppf(0.975, n - 1) * statistics.stdev(known) / math.sqrt(n)
        assert half[column] == pytest.approx(expected, rel=1e-9)
    assert math.isnan(half[2])


def test_seeds_whose_steps_differ_slightly_are_averaged_at_common_ones():
    def series(*steps):
        return Series(np.array(steps), np.arange(len(steps)) + float(steps[-1]))

    near = curves.line(0, [series(900, 1803), series(900, 1800)])
    assert near.steps.tolist() == [900, 1803]
    assert near.mean.tolist() == [1801.5, 1802.5]
    for other in (
        series(900, 1700),
        series(
            900,
        ),
        series(1800, 1801, 1802),
    ):
        far = curves.line(0, [series(900, 1803), other])
        assert far.steps.tolist() == sorted({900, 1803, *other.steps.tolist()})
        assert far.mean[-1] == 1804.0


def test_the_headline_names_the_best_group_and_tests_it_against_the_next(tmp_path):
    sweep = synthetic.sweep(tmp_path, WORDS)
    losses = {"pre": [2.2, 2.3, 2.4], "peri": [2.0, 2.11, 2.19], "post": [2.1, 2.2, 2.3]}
    for number, (name, seed) in enumerate((n, s) for n in losses for s in range(3)):
        path = sweep / str(number) / "result.json"
        result = json.loads(path.read_text())
        result["metrics"]["val/loss"] = losses[name][seed]
        path.write_text(json.dumps(result))
    found = find(collect(sweep).runs)
    assert [spread.group.label for spread in found.spreads] == ["norm=peri", "norm=post", "norm=pre"]
    test = stats.ttest_rel(losses["post"], losses["peri"]).confidence_interval(0.95)
    mean, half, pairs = found.spreads[1].less
    assert (mean - half, mean + half, pairs) == (pytest.approx(test.low), pytest.approx(test.high), 3)
    assert found.headline == "norm=peri has the lowest validation loss: 2.1000\u00a0±\u00a00.24."
    assert "That is 0.1000 ± 0.025 below norm=post, the next best (differences paired by seed, 3 pairs" in found.detail
    assert found.detail.endswith("an interval without zero.")


def test_one_seed_is_no_sample(tmp_path):
    found = find(collect(synthetic.sweep(tmp_path, {"norm": ["pre", "peri"]})).runs)
    assert found.headline == "norm=pre has the lowest validation loss: 2.0000."
    assert found.detail.endswith("One seed each, so nothing is known of how far seeds spread.")


def test_equal_runs_are_told_apart_by_name_and_not_averaged(tmp_path):
    runs = [synthetic.run(tmp_path / name, ["norm=pre", "seed=0"]) for name in ("a", "b")]
    found = find(gather(runs).runs)
    assert [group.label for group in found.groups] == ["run=a", "run=b"]


def test_a_stream_is_judged_by_its_accuracy_where_more_is_better(tmp_path):
    sweep = synthetic.sweep(tmp_path, {"norm": ["pre", "peri"]})
    synthetic.stream(sweep / "0", first=0.8)
    synthetic.stream(sweep / "1", first=0.9)
    found = find(collect(sweep).runs)
    assert found.headline == "norm=peri has the highest final average accuracy: 0.8000."
    data = embedded(page.of_directory(sweep).read_text())
    assert data["matrices"][1]["cells"] == [[90, None, None], [80, 90, None], [70, 80, 90]]


def test_a_run_that_diverged_wins_nothing_and_is_named(tmp_path):
    sweep = synthetic.sweep(tmp_path, {"norm": ["pre", "peri"]})
    rows = read(sweep / "0" / "metrics.jsonl")
    rows[7]["train/loss"] = math.nan
    (sweep / "0" / "metrics.jsonl").write_text("".join(map(line, rows)))
    result = json.loads((sweep / "0" / "result.json").read_text())
    result["metrics"]["val/loss"] = math.nan
    (sweep / "0" / "result.json").write_text(json.dumps(result))
    assert find(collect(sweep).runs).headline.startswith("norm=peri has the lowest")
    text = page.of_directory(sweep).read_text()
    assert "norm=pre: not finite in run 0 from step 8." in text
    assert embedded(text)["losses"][1]["lines"][0]["y"][7] is None


def test_only_settings_that_differ_are_listed_and_what_goes_together_once(tmp_path):
    runs = collect(synthetic.sweep(tmp_path, {"norm": ["pre", "peri"], "seed": [0, 1]})).runs
    for run in runs:
        run.config |= {"norm._target_": run.config["choices.norm"].title(), "width": "8"}
    differing, same = config_differences(runs)
    assert [(one.key, one.values, one.others) for one in differing] == [
        ("norm", [("pre", ["0", "1"]), ("peri", ["2", "3"])], ["norm._target_"]),
        ("seed", [("0", ["0", "2"]), ("1", ["1", "3"])], []),
    ]
    assert same == {"width": "8", "trainer.threads": "1"}


# --- numbers -------------------------------------------------------------------------------------------------------


def rounded(text: str) -> float | None:
    return None if text == "" else float(f"{float(text):.5g}")


def test_every_number_of_a_chart_stands_in_full_in_the_csv_beside_it(tmp_path):
    sweep = synthetic.sweep(tmp_path, WORDS, steps=1500)
    synthetic.stream(sweep / "0")
    text = page.of_directory(sweep).read_text()
    data, labels = embedded(text), [group["label"] for group in embedded(text)["groups"]]
    for name, part in (("loss", "losses"), ("series", "series")):
        written = {(r["metric"], r["group"], int(r["step"])): r for r in table(sweep / "report" / f"{name}.csv")}
        count = 0
        for series in data[part]:
            for one in series["lines"]:
                for k, (step, value) in enumerate(zip(one["x"], one["y"], strict=True)):
                    row = written[series["name"], labels[one["group"]], step]
                    assert rounded(row["mean"]) == value
                    assert rounded(row["ci95_half_width"]) == (one["half"][k] if "half" in one else None)
                    count += 1
        assert count == len(written)
    cells = {(r["measure"], r["group"], r["block"], int(r["step"])): r for r in table(sweep / "report" / "blocks.csv")}
    profiles = {
        (r["measure"], r["group"], r["at"], r["block"]): r for r in table(sweep / "report" / "profiles.csv")
    }  # fmt: skip
    for measure in data["measures"]:
        for one in measure["maps"]:
            key = measure["name"], labels[one["group"]]
            for block, row in zip(one["blocks"], one["cells"], strict=True):
                for step, cell in zip(one["steps"], row, strict=True):
                    assert rounded(cells.pop((*key, block, step))["value"]) == cell
            for at, profile in zip(("first", "middle", "last"), one["profiles"], strict=True):
                for block, value in zip(one["blocks"], profile["values"], strict=True):
                    assert rounded(profiles.pop((*key, at, block))["value"]) == value
    assert not cells
    assert not profiles
    assert table(sweep / "report" / "accuracy.csv")[0]["accuracy"] == "0.9"


def test_the_csv_agrees_with_the_metrics_files(tmp_path):
    sweep = synthetic.sweep(tmp_path, {"norm": ["pre"], "seed": [0, 1]}, steps=30)
    page.of_directory(sweep)
    first, second = (read(sweep / str(k) / "metrics.jsonl") for k in range(2))
    for row in table(sweep / "report" / "loss.csv"):
        a, b = (rows[int(row["step"]) - 1][row["metric"]] for rows in (first, second))
        assert float(row["mean"]) == (a + b) / 2
    for row in table(sweep / "report" / "blocks.csv"):
        kind, _, rest = row["measure"].partition("/")
        _, _, site = rest.partition(".")
        name = f"{kind}/blocks.{row['block']}" + (f".{site}" if site else "")
        a, b = (rows[int(row["step"]) - 1][name] for rows in (first, second))
        assert float(row["value"]) == pytest.approx((a + b) / 2, rel=1e-15)
    assert {row["measure"] for row in table(sweep / "report" / "blocks.csv")} == {
        "grad_norm/blocks", "grad_norm/blocks.attn", "hidden_variance/blocks",
    }  # fmt: skip


def test_thinning_keeps_ends_spikes_and_gaps():
    values = np.sin(np.arange(10_000) / 500)
    values[[1234, 7777]] = 50, -50
    values[4000:4400] = np.nan
    kept = curves.thinned(values, 400)
    assert len(kept) <= 400
    assert {0, 1234, 7777, 9999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert np.isnan(values[kept]).any()
    assert curves.thinned(values[:400], 400).tolist() == list(range(400))


def test_a_map_column_is_the_largest_of_its_steps_and_broken_cells_are_infinite(tmp_path):
    rows = [{"step": s, "grad_norm/blocks.0": float(s == 777), "grad_norm/blocks.10": 1.0} for s in range(1, 1001)]
    rows[-1]["grad_norm/blocks.10"] = math.nan
    rows += [{"step": 1001, "grad_norm/blocks.2": 3.0}]
    run = synthetic.run(tmp_path / "a", [])
    (run / "metrics.jsonl").write_text("".join(map(line, rows)))
    found = find(collect(run).runs)
    (measure,), dropped = blocks.measures(found.groups, [0])
    (one,) = measure.maps
    assert dropped == 0
    assert one.blocks == ["0", "2", "10"]
    assert one.cells.shape == (3, 100)
    assert np.nansum(one.cells[0]) == 1.0
    assert np.isinf(one.cells[2, -1])
    assert [step for step, _ in one.profiles] == [1, 500, 1001]


# --- words of users ------------------------------------------------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&<b>${title} {{x}} <!-- ]]> \u2028"


def test_what_users_wrote_stays_text(tmp_path):
    folder = tmp_path / "<i>&'\""
    sweep = synthetic.sweep(folder, {"norm": ["pre", HOSTILE]})
    synthetic.run(sweep / "1", [f"norm={HOSTILE}"], status="failed", reason=HOSTILE)
    record = json.loads((sweep / "sweep.json").read_text())
    record["jobs"][1] |= {"status": "failed", "reason": HOSTILE}
    (sweep / "sweep.json").write_text(json.dumps(record))
    (sweep / "1" / "config.yaml").write_text(json.dumps({"norm": HOSTILE, HOSTILE: 1}))
    rows = [row | {f"x/{HOSTILE}": 1.0} for row in read(sweep / "1" / "metrics.jsonl")]
    (sweep / "1" / "metrics.jsonl").write_text("".join(map(line, rows)))
    (sweep / "<img src=x>").write_text("")
    text = page.of_directory(sweep).read_text()
    parsed, calm = (
        Parsed(text),
        Parsed(page.of_directory(synthetic.sweep(tmp_path / "c", {"norm": ["pre"]})).read_text()),
    )
    assert [tag for tag, _ in parsed.tags].count("script") == [tag for tag, _ in calm.tags].count("script") == 3
    assert not [tag for tag, _ in parsed.tags if tag in ("img", "b", "i")]
    assert not [name for _, attributes in parsed.tags for name in attributes if name.startswith("on")]
    assert HOSTILE in parsed.text
    assert embedded(text)["groups"][1]["label"] == f"norm={HOSTILE}"


def test_no_script_but_the_pages_own_would_run(tmp_path):
    text = page.of_directory(synthetic.run(tmp_path / "a", [])).read_text()
    (policy,) = [a["content"] for tag, a in Parsed(text).tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy.split(";")[1]
    assert "\r" not in text


# --- size and speed ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 10])
def test_300_runs_of_1000_points_make_a_page_of_at_most_15_megabytes(tmp_path, seeds):
    words = {"norm": [f"n{k}" for k in range(300 // seeds)], "seed": list(range(seeds))}
    sweep = synthetic.sweep(tmp_path, words, steps=1000)
    began = time.process_time()
    out = page.of_directory(sweep)
    assert time.process_time() - began < 60
    assert out.stat().st_size < 15e6
    data = embedded(out.read_text())
    assert data["left"] == data["unmapped"] == 0
    assert sum(group["colour"] >= 0 for group in data["groups"]) == page.COLOURED
    drawn = [len(one["x"]) for series in [*data["losses"], *data["series"]] for one in series["lines"]]
    assert max(drawn) <= 400
    assert len(drawn) == 300 // seeds * 16
    best = [group["label"] for group in data["groups"] if group["colour"] >= 0]
    assert best == [f"norm=n{k}" for k in range(12)]


def test_metrics_without_room_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "IN_A_PAGE", 100)
    text = page.of_directory(synthetic.run(tmp_path / "a", [])).read_text()
    data = embedded(text)
    assert data["losses"]
    assert data["left"] + len(data["series"]) == 14
    assert data["left"] > 0


# --- the command ---------------------------------------------------------------------------------------------------


def report(*argv: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainkit.report", *argv]
    return subprocess.run(command, cwd=cwd, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)


def test_the_command_writes_where_it_is_told_and_says_where(tmp_path):
    sweep = synthetic.sweep(tmp_path / "s", {"norm": ["pre", "peri"]})
    done = report("s", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "s/report.html\n")
    assert (sweep / "report" / "loss.csv").is_file()
    done = report("compare", "s/0", "s/1", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "report.html\n")
    done = report("compare", "s/0", "s", "--out", "deep/er.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "deep/er.html\n")
    assert (tmp_path / "deep" / "er" / "runs.csv").is_file()
    assert 'href="../s/0"' in (tmp_path / "deep" / "er.html").read_text()


def test_mistakes_in_the_command_are_told_with_exit_code_2(tmp_path):
    for argv, told in (
        ([], "usage: python -m trainkit.report DIR"),
        (["nowhere"], "'nowhere' is no directory"),
        (["compare"], "the following arguments are required: DIR"),
        ([".", "b"], "unrecognized arguments: b"),
        ([".", "--out", "page.txt"], "name it *.html"),
        ([".", "--ouf", "x.html"], "unrecognized arguments"),
    ):
        done = report(*argv, cwd=tmp_path)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("out", ["report.html", "elsewhere/page.html"])
def test_what_a_sweep_was_for_is_the_first_thing_that_it_shows(tmp_path, out):
    folder = synthetic.sweep(tmp_path / "logs", {"norm": ["pre", "peri"]})
    assert 'href="#lr_sensitivity"' not in page.of_directory(folder).read_text()
    with Canvas(1, width=4, height=3, heading="LR", title="") as canvas:
        canvas.axes[0].plot([1, 2], [3, 4])
        canvas.save(folder / "lr_sensitivity.png")
    (folder / "search.png").write_text("no picture")
    text = page.of_directory(folder, tmp_path / out).read_text()
    picture = base64.b64encode((folder / "lr_sensitivity.png").read_bytes()).decode()
    assert text.index(f'src="data:image/png;base64,{picture}"') < text.index('<section id="loss">')
    link = re.search(r'href="([^"]*lr_sensitivity\.csv)"', text)[1]
    assert ((tmp_path / out).parent / link).resolve() == (folder / "lr_sensitivity.csv").resolve()
    assert 'id="search"' not in text
