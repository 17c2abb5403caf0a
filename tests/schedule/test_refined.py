"""The refined schedule: its formula, what it makes of a run's norms, and a run that is trained with it."""

import json
import math
import random
import re
from itertools import pairwise
from statistics import median

import pytest

import trainkit
from tests.menu import build
from tests.schedule.earlier import earlier_run
from tests.test_runs import SMALL
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import check
from trainkit.launch.resume import recorded as plan_of
from trainkit.report.metrics_file import read
from trainkit.schedule import refined as module
from trainkit.schedule.refined import between, closed_form, median_filter, norm_for, recorded, refine, refined, resample


def noisy(count: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [math.exp(draw.gauss(0, 0.5)) + (4 if t < count / 20 else 0) for t in range(count)]


def slow_filter(values: list[float], tau: float) -> list[float]:
    """The authors' recipe, word for word: reflected by twice the width on the right, edges repeated, sorted windows."""
    count, half = len(values), int(tau * len(values)) // 2
    width = 2 * half + 1
    period = max(1, 2 * (count - 1))
    reflected = [values[min(i % period, period - i % period)] for i in range(count, count + 2 * width)]
    padded = [*[values[0]] * half, *values, *reflected, *[reflected[-1]] * half]
    return [median(padded[t : t + width]) for t in range(count)]


def slow_schedule(values: list[float], power: int, tau: float) -> list[float]:
    """η_t = ω_t Σ_{p>t} ω_p by the double sum, divided by its largest."""
    weights = [g**-power for g in slow_filter(values, tau)]
    rates = [w * math.fsum(weights[t + 1 :]) for t, w in enumerate(weights)]
    return [rate / max(rates) for rate in rates]


# --- norms -> schedule --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 19, 20, 41, 200, 333])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.29, 0.5, 1.0])
def test_the_filter_is_the_authors(count, tau):
    values = noisy(count)
    assert median_filter(values, tau) == slow_filter(values, tau)
    coarse = [round(value) * 1.0 for value in values]  # many ties
    assert median_filter(coarse, tau) == slow_filter(coarse, tau)


@pytest.mark.parametrize(("norm", "power"), [("l2", 2), ("l1", 1)])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.3])
def test_the_schedule_is_the_formula(norm, power, tau):
    values = noisy(150, seed=3)
    assert refine(values, norm=norm, tau=tau) == pytest.approx(slow_schedule(values, power, tau), rel=1e-12)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_constant_norms_give_linear_decay_exactly(norm):
    assert refine([2.5] * 50, norm=norm) == [(49 - t) / 49 for t in range(50)]


@pytest.mark.parametrize("scale", [1e-200, 1e-3, 1e8, 1e200])
def test_the_scale_of_the_norms_does_nothing(scale):
    values = noisy(120)
    assert refine([scale * value for value in values]) == pytest.approx(refine(values), rel=1e-9)


def test_norms_that_rise_at_the_end_anneal_faster():
    flat = refine([1.0] * 200)
    rising = refine([1.0 + max(0, t - 150) / 10 for t in range(200)])
    assert all(rising[t] < 0.7 * flat[t] for t in range(170, 199))


def test_large_norms_at_the_start_become_a_warm_up():
    schedule = refine([1 + 9 * math.exp(-t / 20) for t in range(200)])
    peak = schedule.index(1.0)
    assert 20 < peak < 120
    assert schedule[0] < 0.05
    assert all(a <= b for a, b in pairwise(schedule[: peak + 1]))


def test_a_spike_is_filtered_out():
    values = [1.0] * 100
    values[50] = 1e6
    assert refine(values) == refine([1.0] * 100)


def test_zero_norms_count_as_the_smallest_positive_one():
    values = [2.0] * 60 + [0.0] * 30 + [1.0] * 10
    assert refine(values, tau=0) == refine([v or 1.0 for v in values], tau=0)
    assert all(math.isfinite(rate) for rate in closed_form([1e-300, 1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match="must not all be zero"):
        refine([0.0] * 10)
    with pytest.raises(ValueError, match="at least 2 steps"):
        refine([1.0])


@pytest.mark.parametrize("tau", [-0.1, 1.5, math.nan])
def test_a_share_is_a_share(tau):
    with pytest.raises(ValueError, match=r"schedule\.tau .* between 0 and 1; got"):
        refine([1.0] * 10, tau=tau)


def test_a_long_run_is_refined_in_no_time():
    values = noisy(200_000)
    schedule = refine(values)
    assert max(schedule) == 1.0
    assert schedule[-1] == 0.0


@pytest.mark.parametrize("total", [2, 7, 50, 99, 100, 101, 399])
def test_another_length_interpolates_over_the_fraction_of_training(total):
    line = [(99 - t) / 99 for t in range(100)]
    assert resample(line, total) == pytest.approx([(total - 1 - t) / (total - 1) for t in range(total)], abs=1e-14)
    bent = refine(noisy(100))
    assert resample(resample(bent, 397), 100) == pytest.approx(bent, abs=1e-12)  # 396 is 4 times 99: every point is hit
    assert (max(resample(bent, total)), resample(bent, total)[-1]) == (1.0, 0.0)
    assert resample(bent, 1) == [1.0]


# --- run -> norms -------------------------------------------------------------------------------------------------


def test_the_norms_of_a_run_are_read_as_they_were_logged(tmp_path):
    norms, l1 = noisy(40), noisy(40, seed=1)
    run = earlier_run(tmp_path / "run", norms, l1)
    assert recorded(run, "l2") == norms
    assert recorded(run, "l1") == l1


def test_steps_that_were_not_logged_are_interpolated(tmp_path):
    ramp = [3.0 + 0.5 * t for t in range(40)]
    assert recorded(earlier_run(tmp_path / "run", ramp, every=10), "l2") == pytest.approx(ramp)
    assert between([3, 5], [1.0, 2.0]) == [1.0, 1.0, 1.0, 1.5, 2.0]


def test_norms_that_are_no_numbers_count_as_not_logged(tmp_path):
    ramp = [3.0 + 0.5 * t for t in range(20)]
    broken = [math.nan if t in (4, 5) else math.inf if t == 9 else g for t, g in enumerate(ramp)]
    assert recorded(earlier_run(tmp_path / "run", broken), "l2") == pytest.approx(ramp)


def test_the_optimizer_decides_which_norm(tmp_path):
    l2, l1 = noisy(60), noisy(60, seed=5)
    run = earlier_run(tmp_path / "run", l2, l1)
    for optimizer, norms, norm in (("sgd", l2, "l2"), ("adamw", l1, "l1")):
        words = ["schedule=refined", f"schedule.from_run={run}", f"optimizer={optimizer}"]
        schedule = build("schedule", *words)(total=60)
        assert [schedule(step) for step in range(60)] == refine(norms, norm=norm)
    chosen = build("schedule", "schedule=refined", f"schedule.from_run={run}", "schedule.norm=l2", "schedule.tau=0")
    assert [chosen(total=60)(step) for step in range(60)] == refine(l2, norm="l2", tau=0)
    assert norm_for("trainkit.optimizer.adamp.SGDP") == "l2"
    for optimizer, says in (("", "it is not given"), ("trainkit.optimizer.sam.SAM", "SAM does not tell which")):
        with pytest.raises(ValueError, match=rf"schedule\.norm=auto .* {says}.*schedule\.norm=l2 for SGD, else l1"):
            refined(total=5, from_run=str(run), optimizer=optimizer)


def test_the_end_is_kept_and_the_length_is_the_runs(tmp_path):
    run = earlier_run(tmp_path / "run", [1.0] * 30)
    schedule = refined(total=90, from_run=str(run), norm="l2")
    assert (schedule(0), schedule(89), schedule(90), schedule(500)) == (1.0, 0.0, 0.0, 0.0)
    assert schedule(45) == pytest.approx(44 / 89)


# --- mistakes, found before the run -------------------------------------------------------------------------------

ADAM, SGD = "optimizer=adamw", "optimizer=sgd"


@pytest.mark.parametrize(
    ("make", "word", "says"),
    [
        (lambda d: d / "nowhere", SGD, "does not exist"),
        (lambda d: earlier_run(d / "run", []), SGD, r"logged no grad_norm/global\. Record one whose callbacks have"),
        (lambda d: earlier_run(d / "run", [1.0] * 9), ADAM, r"logged grad_norm/global but not .*schedule\.norm=l2"),
        (lambda d: earlier_run(d / "run", [1.0] * 2), SGD, r"2 steps with .* at least 3 .*log_every_n_steps=1"),
        (lambda d: earlier_run(d / "run", [0.0] * 9), SGD, "logged as zero at every step"),
        (lambda d: earlier_run(d / "run", [1.0] * 9, status="failed"), SGD, "did not reach its end .*failed"),
    ],
)
def test_a_run_that_cannot_be_used_is_found_out_before_anything_is_built(make, word, says, tmp_path):
    run = make(tmp_path)
    with pytest.raises(UserError) as caught:
        check([word, "schedule=refined", f"schedule.from_run={run}"])
    assert len(str(caught.value).splitlines()) <= 3
    assert f"schedule.from_run={run}" in str(caught.value).splitlines()[0]
    assert re.search(says, str(caught.value), re.DOTALL), str(caught.value)


def test_a_directory_without_a_log_is_named(tmp_path):
    run = earlier_run(tmp_path / "run", [1.0] * 9)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        check(["optimizer=sgd", "schedule=refined", f"schedule.from_run={run}"])


def test_last_is_settled_once_for_all(tmp_path, monkeypatch):
    """A sweep's jobs, and a run that is resumed, must not take a newer run for the last one."""
    run = earlier_run(tmp_path / "logs" / "it's" / "a run", [1.0] * 9)
    words = ["optimizer=sgd", "schedule=refined", "schedule.from_run=last", f"paths.log_dir={tmp_path / 'logs'}"]
    plan = check(["-m", *words, "seed=0,1"])
    assert [cfg.schedule.from_run for cfg in plan.configs] == [str(run)] * 2
    newer = earlier_run(tmp_path / "logs" / "gpt" / "newer", [1.0] * 9)
    (newer / "result.json").write_text(json.dumps({"status": "finished", "started": 2.0}))
    for again in (check(job) for job in plan.overrides):
        assert again.configs[0].schedule.from_run == str(run)
        assert again.overrides[0] in plan.overrides
    assert check(words).configs[0].schedule.from_run == str(newer)
    monkeypatch.chdir(tmp_path / "logs")
    assert check([*words[:2], "schedule.from_run=gpt/newer"]).configs[0].schedule.from_run == str(newer)


def test_a_further_rank_takes_the_run_that_rank_0_took(tmp_path, monkeypatch):
    run = earlier_run(tmp_path / "logs" / "a", [1.0] * 9)
    live = tmp_path / "logs" / "live"
    live.mkdir()
    (live / "result.json").write_text(json.dumps({"status": "running", "started": 5.0}))
    (live / "config.yaml").write_text(f"schedule: {{from_run: {run}}}\n")
    monkeypatch.setenv("TRAINKIT_RUN_DIR", str(live))
    monkeypatch.setenv("LOCAL_RANK", "1")
    words = ["optimizer=sgd", "schedule=refined", "schedule.from_run=last", f"paths.log_dir={tmp_path / 'logs'}"]
    assert check(words).configs[0].schedule.from_run == str(run)


def test_the_jobs_of_a_sweep_read_the_log_once(tmp_path, monkeypatch):
    run = earlier_run(tmp_path / "run", [1.0] * 9)
    reads = []
    monkeypatch.setattr("trainkit.launch.check.from_run.recorded", lambda *given: reads.append(given))
    check(["-m", "optimizer=sgd", "schedule=refined", f"schedule.from_run={run}", "seed=range(5)"])
    assert len(reads) == 1


# --- through the user's door --------------------------------------------------------------------------------------


def test_a_run_is_recorded_and_another_trained_with_what_its_norms_call_for(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(400)))
    folders = [f"paths.log_dir={tmp_path / 'logs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    words = [*SMALL, "data=text", f"data.path={corpus}", "logger=none", *folders, "trainer.log_every_n_steps=1"]
    words += ["optimizer.lr=1e-3"]
    first = trainkit.run([*words, "trainer.max_steps=8"]).dir
    norms = [row["grad_norm/global_l1"] for row in read(first / "metrics.jsonl") if "grad_norm/global_l1" in row]
    assert len(norms) == 8

    refining = ["schedule=refined", "schedule.from_run=last"]
    second = trainkit.run([*words, *refining, "trainer.max_steps=8"]).dir
    rates = [row["lr"] for row in read(second / "metrics.jsonl") if "lr" in row]
    assert rates == pytest.approx([1e-3 * factor for factor in refine(norms, norm="l1")], abs=1e-15)
    assert f"schedule.from_run='{first}'" in json.loads((second / "result.json").read_text())["overrides"]

    resumed = plan_of(check([f"resume={second}", *folders, "trainer.max_steps=10"])).configs[0]
    assert resumed.schedule.from_run == str(first)
    third = trainkit.run([f"resume={second}", "trainer.max_steps=12"]).dir
    rates = [row["lr"] for row in read(third / "metrics.jsonl") if "lr" in row]
    longer = [1e-3 * factor for factor in resample(refine(norms, norm="l1"), 12)]
    assert rates[9:] == pytest.approx(longer[9:], abs=1e-15)  # step 9 is made with the rate in the checkpoint
    assert trainkit.run(["mode=eval", f"resume={third}"]).metrics["val/loss"] > 0


def test_a_mistake_leaves_the_disk_alone(tmp_path):
    run = earlier_run(tmp_path / "run", [1.0] * 9)
    words = ["schedule=refined", f"schedule.from_run={run}", f"paths.log_dir={tmp_path / 'logs'}"]
    with pytest.raises(UserError, match="but not grad_norm/global_l1"):
        trainkit.run(words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_names_are_those_that_runs_log():
    assert module.LOGGED == {"l1": "grad_norm/global_l1", "l2": "grad_norm/global"}
