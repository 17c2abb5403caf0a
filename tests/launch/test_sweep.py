"""Sweeps: which jobs run, when, with what, and what is told and kept of them. The jobs are fake_run.py."""

import csv
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trainkit.launch import rundir, summary
from trainkit.launch import sweep as module
from trainkit.launch.console import log, to_terminal
from trainkit.launch.preflight import UserError, check
from trainkit.launch.process import machine
from trainkit.launch.resume import recorded
from trainkit.launch.wandb_report import is_online

FAKE = Path(__file__).with_name("fake_run.py")


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(module, "RUN", FAKE)
    monkeypatch.setattr(module, "GRACE", 10.0)


@pytest.fixture
def go(tmp_path):
    """Runs a sweep as run.py does; returns its exit code."""

    def run(*words: str) -> int:
        return module.sweep(recorded(check(["-m", *words, f"paths.log_dir={tmp_path}"])))

    return run


@pytest.fixture
def told():
    """What sweeps say, as one text."""

    class Lines(logging.Handler):
        text = ""

        def emit(self, record):
            self.text += record.getMessage() + "\n"

    to_terminal()
    handler = Lines()
    log.addHandler(handler)
    yield lambda: handler.text
    log.removeHandler(handler)


def directory(tmp_path: Path) -> Path:
    (found,) = tmp_path.rglob("sweep.json")
    return found.parent


def jobs(tmp_path: Path) -> list[dict]:
    return json.loads((directory(tmp_path) / "sweep.json").read_text())["jobs"]


def seen(tmp_path: Path, number: int) -> dict:
    return json.loads((directory(tmp_path) / str(number) / "seen.json").read_text())


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# --- one after another -------------------------------------------------------------------------------------------


def test_every_job_has_a_directory_its_words_and_a_clean_environment(go, tmp_path, monkeypatch, told, capfd):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WANDB_RUN_ID", "x")
    assert go("norm=pre,sandwich", "seed=3") == 0
    for number, norm in enumerate(("pre", "sandwich")):
        job, child = jobs(tmp_path)[number], seen(tmp_path, number)
        assert job["status"] == "finished"
        assert job["dir"] == str(directory(tmp_path) / str(number))
        assert job["metrics"]["val/loss"] == 2.3
        assert (job["parameters"], job["optimizer_state_bytes"], job["exit_code"]) == (1000, 8004, 0)
        assert child["argv"] == [f"norm={norm}", "seed=3", f"paths.log_dir={tmp_path}", f"paths.run_dir={job['dir']}"]
        assert child["status"] == "running"  # sweep.json was written before the job began
        assert not {"LOCAL_RANK", "TORCHELASTIC_RUN_ID", "WANDB_RUN_ID"} & set(child["environment"])
    assert "job 0  norm=pre  finished  val/loss 2.3000  test/loss 3.0000  0:0" in told()
    assert "[2/2]" in told()
    assert "on standard output" in capfd.readouterr().out  # one at a time, so the terminal is the job's


@pytest.mark.parametrize(("fragment", "online"), [
    ("run-20260101_000000-id1", True), ("offline-run-20260101_000000-id1", False), ("run-20260101_000000-id2", False),
])  # fmt: skip
def test_the_report_goes_where_the_runs_went(tmp_path, fragment, online):
    (tmp_path / "wandb" / fragment).mkdir(parents=True)
    assert is_online(tmp_path, ["id0", "id1"]) is online


def test_another_logger_has_no_place_for_a_report(go, tmp_path, monkeypatch):
    (tmp_path / "wandb" / "run-20260101_000000-id1").mkdir(parents=True)
    published = []
    monkeypatch.setattr(module, "publish", lambda cfg, *places: published.append((cfg.choices.logger, *places)))
    assert go("seed=0,1", "logger=csv,wandb") == 0
    assert published == [("wandb", directory(tmp_path), directory(tmp_path) / "report.html")]


def test_a_report_that_cannot_be_uploaded_is_said_to_be_on_disk(go, tmp_path, monkeypatch, told):
    (tmp_path / "wandb" / "run-20260101_000000-id0").mkdir(parents=True)
    monkeypatch.setattr(module, "publish", lambda *_: 1 / 0)
    assert go("seed=0,1", "logger=wandb") == 0
    page = directory(tmp_path) / "report.html"
    assert f"the report was not uploaded to W&B (ZeroDivisionError: division by zero); it is {page}" in told()
    assert page.is_file()


FAILURES = {
    "post": ("NonFiniteLoss: the loss is nan", 1),
    "peri": ("RuntimeError: before the run began", 1),
    "mix": ("data.path: no such file name another one", 2),
    "output": ("ended by SIGKILL; was memory short?", -9),
}


def test_a_job_that_fails_is_told_in_one_line_and_the_others_run(go, tmp_path, told):
    assert go(f"norm={','.join(FAILURES)},pre") == 1
    found = jobs(tmp_path)
    assert [job["status"] for job in found] == ["failed"] * 4 + ["finished"]
    assert [(job["reason"], job["exit_code"]) for job in found[:4]] == list(FAILURES.values())
    table = (directory(tmp_path) / "summary.md").read_text()
    for number, (norm, (reason, _)) in enumerate(FAILURES.items()):
        path = directory(tmp_path) / str(number) / "run.log"
        assert f"job {number}  norm={norm}  failed  {reason}  {path}" in told()
        assert f"- job {number} (norm={norm}): {reason}" in table
    for number in (0, 1):
        text = (directory(tmp_path) / str(number) / "run.log").read_text()
        assert text.count("Traceback") == 1
        assert text.count(list(FAILURES.values())[number][0]) == 1


def test_on_error_stop_leaves_the_rest(go, tmp_path, told):
    assert go("norm=pre,post,sandwich", "sweep.on_error=stop") == 1
    assert [job["status"] for job in jobs(tmp_path)] == ["finished", "failed", "waiting"]
    assert "sweep.on_error=stop: the other 1 jobs are not started" in told()
    assert f"python run.py -m sweep.resume={directory(tmp_path)}" in told()


def test_the_directory_may_be_named(go, tmp_path):
    assert go("seed=1,2", f"paths.run_dir={tmp_path / 'mine'}") == 0
    assert directory(tmp_path) == tmp_path / "mine"
    with pytest.raises(UserError, match=r"is not empty.*-m sweep\.resume="):
        go("seed=1,2", f"paths.run_dir={tmp_path / 'mine'}")


def test_a_launcher_of_ranks_must_not_start_a_sweep(go, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without torchrun"):
        go("seed=1,2")


# --- several at a time -------------------------------------------------------------------------------------------


def overlaps(tmp_path: Path, count: int) -> int:
    """How many jobs ran at the same time, at most."""
    spans = [(child["began"], child["ended"]) for child in (seen(tmp_path, n) for n in range(count))]
    return max(sum(a <= moment < b for a, b in spans) for moment, _ in spans)


def test_jobs_share_the_machine(go, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(machine, "cores", lambda: 7)
    assert go("seed=1,2,3,4", "schedule.final=0.5", "sweep.jobs=3") == 0
    assert overlaps(tmp_path, 4) in (2, 3)  # 3, unless the machine is so slow that the first has ended before
    assert "trainer.threads=2" in seen(tmp_path, 0)["argv"]
    assert "trainer.threads=2" not in jobs(tmp_path)[0]["overrides"]
    assert "on standard output" not in capfd.readouterr().out
    assert "on standard output" in (directory(tmp_path) / "0" / "console.log").read_text()


def test_threads_that_are_set_are_kept(go, tmp_path):
    assert go("seed=1,2", "sweep.jobs=2", "trainer.threads=5") == 0
    assert [w for w in seen(tmp_path, 0)["argv"] if w.startswith("trainer.threads")] == ["trainer.threads=5"]


def test_each_job_has_gpus_of_its_own(go, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "gpus", lambda: ["0", "1", "GPU-x"])
    assert go("trainer=gpu", "trainer.devices=1,2,1", "schedule.final=0.3", "sweep.jobs=3") == 0
    assert [seen(tmp_path, n)["gpus"] for n in (0, 1)] == ["0", "1,GPU-x"]
    assert seen(tmp_path, 2)["gpus"] in ("0", "1", "GPU-x")
    assert overlaps(tmp_path, 3) <= 2


def test_gpus_limit_how_many_run_and_cpu_jobs_take_none(go, tmp_path, monkeypatch, told):
    monkeypatch.setattr(module, "gpus", lambda: ["7"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert go("trainer=gpu,cpu", "seed=1,2", "schedule.final=0.2", "sweep.jobs=2") == 0
    assert "4 jobs, 1 at a time (1 GPUs)" in told()
    assert [seen(tmp_path, n)["gpus"] for n in range(4)] == ["7", "7", None, None]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trainer.devices=3"], "this machine has 2 GPUs"),
        (["trainer.devices=[0,1]"], r"gives them out itself\nwrite how many each job gets: trainer\.devices=2"),
    ],
)
def test_gpus_that_cannot_be_given_out(go, tmp_path, monkeypatch, words, says):
    monkeypatch.setattr(module, "gpus", lambda: ["0", "1"])
    with pytest.raises(UserError, match=says):
        go("trainer=gpu", *words, "seed=1,2", "sweep.jobs=2", "data.batch_size=6")
    assert not list(tmp_path.iterdir())


def test_devices_are_read_from_nvidia_smi():
    slices = "".join(f"  MIG 1g.10gb Device {n}: (UUID: MIG-{n})\n" for n in range(2))
    listed = f"GPU 0: NVIDIA H100 (UUID: GPU-aa)\n{slices}GPU 1: NVIDIA H100 (UUID: GPU-bb)\n"
    assert machine.parse(listed) == ["MIG-0", "MIG-1", "1"]
    assert machine.parse("") == []


@pytest.mark.parametrize(("visible", "found"), [("", []), ("2, 3", ["2", "3"]), ("-1", []), ("GPU-x", ["GPU-x"])])
def test_devices_that_are_hidden_are_not_used(monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == found


@pytest.mark.parametrize(
    ("devices", "jobs", "threads"), [(1, 1, 8), (2, 1, 4), ([0, 1], 2, 2), ("auto", 3, 2), (9, 9, 1)]
)
def test_threads_divide_the_cores(monkeypatch, devices, jobs, threads):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    assert machine.default_threads(devices, jobs) == threads


# --- interrupted and continued -----------------------------------------------------------------------------------


def interrupt(tmp_path: Path, *numbers: int, job: str = "1") -> threading.Thread:
    """Sends signals to this process, one second apart, once the hanging job has begun."""

    def act() -> None:
        until(lambda: list(tmp_path.rglob(f"{job}/pids")))
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(1)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


SIGNALS = [
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    (signal.SIGTERM, 143),
    pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow),
]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_all_and_says_how_to_go_on(go, tmp_path, told, number, code):
    helper = interrupt(tmp_path, number)
    assert go("norm=pre,lns,sandwich") == code
    helper.join()
    assert [job["status"] for job in jobs(tmp_path)] == ["finished", "interrupted", "waiting"]
    pids = [int(pid) for pid in (directory(tmp_path) / "1" / "pids").read_text().split()]
    until(lambda: not any(map(alive, pids)), 5)
    assert "interrupted with 1 of 3 jobs finished; go on with\n" in told()
    assert f"  python run.py -m sweep.resume={directory(tmp_path)}\n" in told()
    assert (directory(tmp_path) / "summary.csv").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert go("sweep.resume=last") == 0
    assert [job["status"] for job in jobs(tmp_path)] == ["finished"] * 3
    assert "job 0  norm=pre  finished before" in told()
    assert seen(tmp_path, 1)["argv"][-1] == f"resume={directory(tmp_path) / '1'}"
    assert seen(tmp_path, 2)["argv"][-1] == f"paths.run_dir={directory(tmp_path) / '2'}"


DRIVER = """
import sys
from pathlib import Path
from trainkit.launch import sweep
from trainkit.launch.preflight import check
sweep.RUN = Path(sys.argv[1])
sys.exit(sweep.sweep(check(["-m", *sys.argv[2:]])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a killed process cannot take its children with it")
def test_jobs_die_with_a_killed_sweep_and_a_live_one_is_left_alone(go, tmp_path):
    words = ["norm=lns,pre", f"paths.log_dir={tmp_path}"]
    parent = subprocess.Popen([sys.executable, "-c", DRIVER, str(FAKE), *words])
    until(lambda: any(path.read_text() for path in tmp_path.rglob("pids")))
    with pytest.raises(UserError, match=r"is in use by a live sweep; wait for it or stop it first"):
        go("sweep.resume=last")
    child, worker = map(int, (directory(tmp_path) / "0" / "pids").read_text().split())
    assert alive(child)
    parent.kill()
    parent.wait()
    until(lambda: not alive(child), 2)
    os.kill(worker, signal.SIGKILL)  # a loader's worker sees by itself that its run is gone; this one does not
    assert jobs(tmp_path)[0]["status"] == "running"
    assert go("sweep.resume=last", *words) == 0
    assert [job["status"] for job in jobs(tmp_path)] == ["finished"] * 2


def test_a_job_that_was_stopped_before_it_had_a_configuration_starts_afresh(go, tmp_path):
    assert go("seed=1,2") == 0
    first = directory(tmp_path) / "0"
    (first / "config.yaml").unlink()
    (first / "result.json").write_text("{")
    assert go("sweep.resume=last") == 0
    assert seen(tmp_path, 0)["argv"][-1] == f"paths.run_dir={first}"
    assert jobs(tmp_path)[0]["status"] == "finished"


def test_failed_jobs_are_tried_again_and_times_add_up(go, tmp_path):
    assert go("norm=post,pre") == 1
    before = jobs(tmp_path)
    assert go("sweep.resume=last") == 1
    after = jobs(tmp_path)
    assert after[0]["seconds"] > before[0]["seconds"]
    assert after[1]["seconds"] == before[1]["seconds"]


def test_a_continued_sweep_keeps_its_threads_and_settings(go, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 12)
    assert go("norm=pre,post,sandwich", "sweep.jobs=2", "sweep.on_error=stop") == 1
    assert jobs(tmp_path)[2]["status"] in ("waiting", "finished")
    for path in directory(tmp_path).glob("2/*"):
        path.unlink()
    assert go("sweep.resume=last", "sweep.jobs=1", "sweep.on_error=continue") == 1
    assert "trainer.threads=6" in seen(tmp_path, 2)["argv"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["norm=pre,peri"], "was started norm=pre,sandwich, and norm=pre,peri was asked for"),
        (["norm=pre"], "norm=pre was asked for"),
        (["seed=3"], "was started without seed, and seed=3 was asked for"),
        (["norm=sandwich,pre"], "norm=sandwich,pre was asked for"),
    ],
)
def test_other_words_are_another_sweep(go, tmp_path, words, says):
    assert go("norm=pre,sandwich") == 0
    before = (directory(tmp_path) / "sweep.json").read_text()
    with pytest.raises(UserError, match=says) as caught:
        go("sweep.resume=last", *words)
    assert len(str(caught.value).splitlines()) == 2
    assert (directory(tmp_path) / "sweep.json").read_text() == before


def test_the_same_jobs_in_other_words_are_the_same_sweep(go, tmp_path):
    assert go("seed=0,1", "norm=pre") == 0
    assert go("sweep.resume=last", "seed=range(2)") == 0
    assert go(f"sweep.resume={directory(tmp_path)}", "norm=pre", "seed=0,1", "sweep.jobs=2") == 0


def test_a_sweep_is_found_by_name_or_said_to_be_missing(go, tmp_path):
    with pytest.raises(UserError, match=r"sweep\.resume=last: there is no sweep below"):
        go("sweep.resume=last")
    assert go("seed=1,2", "name=one") == 0
    assert go("sweep.resume=last", "name=one") == 0
    with pytest.raises(UserError, match="there is no sweep below"):
        go("sweep.resume=last", "name=two")
    with pytest.raises(UserError, match=r"is no sweep: it lacks sweep\.json; continue the run with resume="):
        go(f"sweep.resume={directory(tmp_path) / '0'}")
    with pytest.raises(UserError, match=r"is a sweep: continue it with python run\.py -m sweep\.resume="):
        rundir.find(str(directory(tmp_path)), tmp_path)


def test_what_a_folder_from_elsewhere_may_not_say(go, tmp_path):
    """A plugin named in sweep.json opens nothing; it must be typed."""
    assert go("seed=1,2") == 0
    path = directory(tmp_path) / "sweep.json"
    record = json.loads(path.read_text())
    for job in record["jobs"]:
        job["overrides"] += ["plugins=[evil]", "+callbacks.x={_target_:evil.run}"]
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"evil.run is outside of trainkit"):
        go("sweep.resume=last")


# --- through a launcher -------------------------------------------------------------------------------------------


@pytest.fixture
def joblib():
    """The words for a launcher that runs jobs one after another, in processes that this one starts."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'trainkit[joblib]'")
    return ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]


def test_a_launcher_stops_after_a_failure_and_goes_on_when_it_is_named_again(go, tmp_path, told, joblib):
    assert go("norm=pre,post,sandwich", "sweep.on_error=stop", *joblib) == 1
    before = jobs(tmp_path)
    assert [job["status"] for job in before] == ["finished", "failed", "waiting"]
    assert before[1]["reason"] == "NonFiniteLoss: the loss is nan"
    assert "sweep.on_error=stop: the other 1 jobs were not started" in told()
    assert f"  python run.py -m {' '.join(joblib)} sweep.resume={directory(tmp_path)}\n" in told()
    with pytest.raises(UserError, match=r"was started with hydra/launcher=joblib .*\n.*hydra/launcher=basic") as caught:
        go("sweep.resume=last")
    assert "\n" in str(caught.value)
    assert go("sweep.resume=last", "sweep.on_error=continue", *joblib) == 1
    after = jobs(tmp_path)
    assert [job["status"] for job in after] == ["finished", "failed", "finished"]
    assert after[0]["seconds"] == before[0]["seconds"]  # not started again
    assert seen(tmp_path, 2)["argv"][-1] == f"paths.run_dir={directory(tmp_path) / '2'}"


def test_a_sweep_changes_to_a_launcher_and_back(go, tmp_path, joblib):
    assert go("norm=post,sandwich", "sweep.on_error=stop") == 1
    assert go("sweep.resume=last", *joblib, "sweep.on_error=continue") == 1
    assert [job["status"] for job in jobs(tmp_path)] == ["failed", "finished"]
    assert go("sweep.resume=last", "hydra/launcher=basic") == 1


def test_a_launcher_that_starts_nothing_is_a_sentence(go, tmp_path, joblib):
    with pytest.raises(UserError, match=r"hydra/launcher=joblib has started no job: ") as caught:
        go("seed=1,2", joblib[0], "hydra.launcher.n_jobs=0")
    assert "\n" not in str(caught.value)
    assert [job["status"] for job in jobs(tmp_path)] == ["waiting"] * 2


# --- SLURM puts a job back into its queue ---------------------------------------------------------------------------


def test_a_requeued_sweep_goes_on(go, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = ["norm=post,pre", "sweep.on_error=stop"]
    assert go(*words) == 1
    first = directory(tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert go(*words, "seed=1") == 1  # the next line of the job's script
    assert len(list(tmp_path.rglob("sweep.json"))) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert go(*words) == 1
    assert len(list(tmp_path.rglob("sweep.json"))) == 2
    assert (first / "0" / "run.log").read_text().count("began") == 2


# --- what it came to ---------------------------------------------------------------------------------------------


def test_summaries_have_jobs_and_means_over_seeds(go, tmp_path, told):
    assert go("norm=pre,sandwich", "seed=0,1,2") == 0
    with (directory(tmp_path) / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["job"], r["norm"], r["seed"], r["status"]) for r in rows[:2]] == [
        ("0", "pre", "0", "finished"), ("1", "pre", "1", "finished"),
    ]  # fmt: skip
    assert [float(r["val/loss"]) for r in rows[:3]] == [2.0, 2.1, 2.2]
    assert (rows[0]["parameters"], rows[0]["optimizer_state_bytes"]) == ("1000", "8004")
    assert "lr" not in rows[0]  # the last learning rate is no result
    means = rows[6:]
    assert [(r["norm"], r["seeds"], r["status"], r["seed"]) for r in means] == [
        ("pre", "3", "mean", ""), ("sandwich", "3", "mean", ""),
    ]  # fmt: skip
    assert float(means[0]["val/loss"]) == pytest.approx(2.1)
    # t = 4.3027 for 2 degrees of freedom, s = 0.1: h = t s / sqrt(3)
    assert float(means[0]["val/loss ci95"]) == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    text = (directory(tmp_path) / "summary.md").read_text()
    assert "| 0 | pre | 0 | finished | 2.0000 | 3.0000 | 1,000 | 0:0" in text
    assert "| pre | 3 | 2.1000 ± 0.25 | 3.0000 ± 0 | 1,000 |" in text
    assert "7.816 KiB (8 B/parameter)" in text
    assert "2.1000 ± 0.25" in told()
    assert "3 seeds" in told()


def test_groups_hold_finished_jobs_that_differ_in_their_seed_alone():
    def job(words: str, status: str = "finished") -> dict:
        return {"overrides": words.split(), "status": status, "metrics": {"val/loss": 1.0}}

    found = [job("norm=pre seed=0"), job("norm=pre seed=1"), job("norm=peri seed=0"), job("norm=peri seed=1", "failed")]
    assert [(values, len(members)) for values, members in summary.groups(found)] == [(["pre"], 2)]
    assert summary.groups([job("norm=pre"), job("norm=peri")]) == []


def test_differences_are_paired_by_seed():
    def job(norm, seed, loss):
        return {"overrides": [f"norm={norm}", f"seed={seed}"], "status": "finished", "metrics": {"test/loss": loss}}

    jobs = [job("pre", s, 1.0 + s) for s in range(3)] + [job("peri", s, 0.5 + s + 0.1 * s) for s in range(3)]
    ((mean, width, pairs),) = summary.differences(jobs, "test/loss")
    apart = [-0.5, -0.4, -0.3]
    assert mean == pytest.approx(-0.4)
    assert width == pytest.approx(4.302653 * statistics.stdev(apart) / 3**0.5, rel=1e-6)
    assert pairs == 3
    assert "Difference to pre" in summary._markdown(Path("sweep"), jobs)
    assert summary.differences([*jobs[:4], job("peri", 7, 1.0)], "test/loss") == [None]


def test_students_quantiles():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 5, 9, 10, 29, 100, 101):
        assert summary.student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_means_of_numbers_that_are_none():
    assert all(map(math.isnan, summary.mean_and_interval([1.0, math.nan])))
    assert summary.mean_and_interval([math.inf, 1.0])[0] == math.inf


@pytest.mark.parametrize(("bytes_", "text"), [(0, "0 B"), (1536, "1.5 KiB"), (3 << 20, "3 MiB"), (5 << 40, "5120 GiB")])
def test_sizes(bytes_, text):
    assert summary.size(bytes_) == text


# --- directories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "/tmp/x", "../../x"])
def test_a_name_stays_below_the_log_directory(name, tmp_path):
    with pytest.raises(UserError, match=r"leads out of paths\.log_dir") as caught:
        rundir.new_dir(tmp_path, name)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"leads out of paths\.log_dir"):
        check([f"name={name}"])


@pytest.mark.parametrize("name", ["a", "a/b", "a/../b", "..a", "."])
def test_other_names_are_folders(name, tmp_path):
    assert rundir.new_dir(tmp_path, name).parent == Path(os.path.normpath(tmp_path / name))


def test_a_lock_is_held_by_one_and_not_by_what_it_forks(tmp_path):
    held = rundir.lock(tmp_path)
    with pytest.raises(UserError, match="is in use by a live run"):
        rundir.check_free(tmp_path)
    read, write = os.pipe()
    worker = os.fork()
    if worker == 0:  # a loader's worker, which outlives its run for a while
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    rundir.unlock(held)

    def free() -> bool:
        try:
            rundir.check_free(tmp_path)
        except UserError:
            return False
        return True

    until(free, 5)
    os.close(write)
    os.waitpid(worker, 0)
    os.close(read)


def test_directories_that_are_there_are_not_used_again(tmp_path):
    assert [rundir.next_dir(tmp_path / "a" / "eval").name for _ in range(3)] == ["eval", "eval_2", "eval_3"]


def test_a_file_that_cannot_be_written_whole_is_not_written(tmp_path):
    rundir.write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(UnicodeEncodeError):
        rundir.write_text(tmp_path / "x.json", "\ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert rundir.read_json(tmp_path / "x.json") == {"a": 1}
