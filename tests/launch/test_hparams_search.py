"""hparams_search: sweeps over learning rates, and searches that ask Optuna for one job after the other."""

import json
import math
import signal
import subprocess
import sys

import pytest

from tests.launch.test_sweep import (  # noqa: F401  # fixtures
    directory,
    fake,
    go,
    interrupt,
    jobs,
    overlaps,
    seen,
    told,
)
from trainkit.launch import sweep as module
from trainkit.launch.mode.hparams_search import Range, entries, text
from trainkit.launch.mode.suggestions import Suggestions
from trainkit.launch.preflight import UserError, check
from trainkit.launch.resume import recorded

SEARCH = ["mode=search", "hparams_search=optuna"]
LR = ["hparams_search=lr_sensitivity", "hparams_search.lr=[1e-3,1e-2,1e-1]"]


@pytest.fixture
def look(tmp_path):
    """Runs a search as run.py does; returns its exit code."""

    def run(*words: str) -> int:
        return module.sweep(recorded(check([*words, f"paths.log_dir={tmp_path}"])))

    return run


def record(tmp_path) -> dict:
    return json.loads((directory(tmp_path) / "sweep.json").read_text())


# --- what is refused -----------------------------------------------------------------------------------------------

SPACE = "hparams_search.space"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hparams_search=lr_sensitivity"], "is a sweep over learning rates: add -m"),
        (["hparams_search=optuna"], "is for a search: python run.py mode=search hparams_search=optuna"),
        (["-m", "hparams_search=optuna"], "is for a search: .* without -m"),
        (["-m", *SEARCH], "mode=search chooses its jobs itself: leave out -m"),
        (["-m", "mode=train,search"], "mode=train,search|leave out -m"),
        (["mode=search"], "add hparams_search=optuna"),
        (["mode=search", "hparams_search=lr_sensitivity"], "is a sweep: python run.py -m"),
        ([*SEARCH, "resume=last"], "goes on with one run"),
        ([*SEARCH, "sweep.jobs=0"], "at least 1; got 0"),
        ([*SEARCH, "norm=pre,peri"], r"takes its values from a space: hparams_search\.space\.norm=\[a,b"),
        (["-m", *LR, "optimizer.lr=1e-3"], "fixes what hparams_search is to vary"),
        (["-m", "hparams_search=none,lr_sensitivity"], "belongs to the whole sweep"),
        (["-m", LR[0], "hparams_search.lr=[1e-3]"], "at least two different positive numbers"),
        (["-m", LR[0], "hparams_search.lr=[1e-3,-1]"], "at least two different positive numbers"),
        (["-m", LR[0], "optimizer=sam"], r"no key 'lr'.*did you mean 'optimizer\.base\.lr'"),
        (["hparams_search.trials=3"], "exists with hparams_search=optuna"),
        ([*SEARCH, "hparams_search.trials=0"], "at least 1; got 0"),
        ([*SEARCH, "hparams_search.seed=-1"], "seed is a whole number"),
        ([*SEARCH, "hparams_search.direction=minimise"], "did you mean 'minimize'"),
        ([*SEARCH, "hparams_search.sampler=cmaes"], "sampler is tpe or random"),
        ([*SEARCH, "hparams_search.metric=loss"], "no job ends with such a number"),
        ([*SEARCH, "hparams_search.trial=3"], r"did you mean 'hparams_search\.trials'"),
        ([*SEARCH, f"{SPACE}={{}}"], "is empty"),
        ([*SEARCH, f"{SPACE}={{optimizer.l:[1,2]}}"], r"did you mean 'optimizer\.lr'"),
        ([*SEARCH, f"{SPACE}.norm=[pre,perl]"], "did you mean 'peri'"),
        ([*SEARCH, f"{SPACE}.norm=[pre,pre]"], "each once"),
        ([*SEARCH, f"{SPACE}.norm=[]"], "list values"),
        ([*SEARCH, f"{SPACE}.norm=pre"], "a list of values"),
        ([*SEARCH, "norm=pre", f"{SPACE}.norm=[pre,peri]"], "norm=pre fixes what"),
        ([*SEARCH, f"{SPACE}.optimizer.lr.low=1"], "must have low < high; got low=1, high=0.1"),
        ([*SEARCH, f"{SPACE}.optimizer.lr.low=0.1"], "must have low < high"),
        ([*SEARCH, f"{SPACE}.optimizer.lr.low=0"], "low must be positive"),
        ([*SEARCH, f"{SPACE}.optimizer.lr.low=a"], r"lr\.low is a number; got a"),
        ([*SEARCH, f"{SPACE}.optimizer.lr.log=1"], r"lr\.log is true or false; got 1"),
        ([*SEARCH, f"{SPACE}.optimizer.lr.step=0.1"], "goes without log: true"),
        ([*SEARCH, f"{SPACE}.optimizer.lr.hihg=1"], "with log: true or step"),
        ([*SEARCH, f"{SPACE}={{optimizer.lr:{{low:1}}}}"], "with log: true or step"),
        ([*SEARCH, f"{SPACE}={{model.depth:{{low:1.5,high:3}}}}"], "depth wants int"),
        ([*SEARCH, f"{SPACE}={{plugins:[[a],[b]]}}"], "belongs to the whole search"),
        ([*SEARCH, f"{SPACE}={{sweep.jobs:[1,2]}}"], "belongs to the whole search"),
    ],
)
def test_a_mistake_is_named_before_anything_starts(words, says):
    with pytest.raises(UserError, match=says) as caught:
        check(words)
    assert len(str(caught.value).splitlines()) <= 3


def test_nothing_heavy_is_imported_for_a_check():
    code = f"""
import sys
from trainkit.launch.preflight import check
check({[*SEARCH, f"{SPACE}.norm=[pre,peri]"]!r})
check({["-m", *LR]!r})
assert not {{"optuna", "torch", "lightning", "matplotlib"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_optuna_that_is_not_installed_is_a_sentence(monkeypatch):
    monkeypatch.setattr("trainkit.launch.mode.hparams_search.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'trainkit\[search\]'") as caught:
        check(SEARCH)
    assert "\n" not in str(caught.value)
    check(["-m", *LR])


# --- learning rates ------------------------------------------------------------------------------------------------


def test_learning_rates_are_added_to_the_grid_unless_the_user_has_his_own():
    plan = check(["-m", "norm=pre,peri", *LR, "seed=1"])
    assert plan.overrides[:4] == [
        ["norm=pre", "seed=1", "optimizer.lr=0.001"], ["norm=pre", "seed=1", "optimizer.lr=0.01"],
        ["norm=pre", "seed=1", "optimizer.lr=0.1"], ["norm=peri", "seed=1", "optimizer.lr=0.001"],
    ]  # fmt: skip
    assert [cfg.optimizer.lr for cfg in plan.configs] == [1e-3, 1e-2, 1e-1] * 2
    assert len(check(["-m", *LR, "optimizer.lr=1,2"]).overrides) == 2
    sam = check(["-m", *LR, "optimizer=sam", "hparams_search.key=optimizer.base.lr"])
    assert [cfg.optimizer.base.lr for cfg in sam.configs] == [1e-3, 1e-2, 1e-1]
    default = [cfg.optimizer.lr for cfg in check(["-m", LR[0]]).configs]
    assert len(default) == 7
    assert (default[0], default[-1]) == (1e-4, 1e-1)


def test_an_experiment_may_choose_it_and_its_jobs_know_nothing_of_it(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /hparams_search: lr_sensitivity]\n"
    )
    words = [f"hydra.searchpath=[{tmp_path}]", "experiment=mine"]
    plan = check(["-m", *words])
    assert len(plan.overrides) == 7
    assert plan.overrides[0][-1] == "hparams_search=none"
    check([word for word in plan.overrides[0] if word != "hydra"])
    with pytest.raises(UserError, match="add -m"):
        check(words)


def test_a_divergence_is_a_result_and_a_failure_is_none(go, tmp_path, told):  # noqa: F811
    assert go("norm=pre,post", "seed=0,1", *LR) == 0
    assert [job["status"] for job in jobs(tmp_path)] == ["finished"] * 6 + ["diverged"] * 6
    assert jobs(tmp_path)[6]["reason"] == "NonFiniteLoss: the loss is nan"
    text = (directory(tmp_path) / "lr_sensitivity.md").read_text()
    # pre: the fake's losses are 2 + seed/10 + 1/4 for each power of ten; post: diverged everywhere
    assert f"| pre | 0.01 | 2.0500 | 2.0000 to 2.1000 | 0 of 6 | 0 | {0.5 / 3:.4f} |" in text
    assert "| post |  |  |  | 6 of 6 | 0 | 0.0000 |" in text
    for name in ("lr_sensitivity.png", "lr_sensitivity.csv", "summary.md"):
        assert (directory(tmp_path) / name).is_file()
    assert "LR sensitivity" in told()
    assert "go on with" not in told()
    assert go("sweep.resume=last") == 0
    assert told().count("diverged before") == 6
    assert (directory(tmp_path) / "6" / "run.log").read_text().count("began") == 1
    assert (directory(tmp_path) / "lr_sensitivity.md").read_text() == text


def test_what_cannot_be_drawn_costs_a_line_and_not_the_sweep(go, tmp_path, told, monkeypatch):  # noqa: F811
    def broken(*_):
        raise ValueError("no such number")

    monkeypatch.setattr("trainkit.report.lr_sensitivity.write", broken)
    assert go(*LR) == 0
    assert "what was found could not be written (ValueError: no such number)" in told()


def test_other_failures_still_count_and_divergences_stop_nothing(go, tmp_path):  # noqa: F811
    assert go("norm=post,mix,pre", *LR, "sweep.on_error=stop") == 1
    assert [job["status"] for job in jobs(tmp_path)] == ["diverged"] * 3 + ["failed"] + ["waiting"] * 5
    assert "3 jobs have no final loss" in (directory(tmp_path) / "lr_sensitivity.md").read_text()


def test_without_it_a_divergence_is_a_failure(go, tmp_path):  # noqa: F811
    assert go("norm=post,pre") == 1
    assert [job["status"] for job in jobs(tmp_path)] == ["failed", "finished"]
    assert not (directory(tmp_path) / "lr_sensitivity.md").exists()


@pytest.mark.slow
def test_a_continued_sweep_over_learning_rates_is_the_same(go, tmp_path):  # noqa: F811
    assert go(*LR) == 0
    assert go("sweep.resume=last", *LR) == 0
    with pytest.raises(UserError, match=r"was started otherwise than with hparams_search\.lr="):
        go("sweep.resume=last", LR[0], "hparams_search.lr=[1e-3,1e-1]")


def test_a_launcher_does_not_stop_at_a_divergence(go, tmp_path):  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'trainkit[joblib]'")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"]
    assert go("norm=post,mix,pre", "optimizer.lr=1,2", LR[0], "sweep.on_error=stop", *launcher) == 1
    assert [job["status"] for job in jobs(tmp_path)] == ["diverged"] * 2 + ["failed"] + ["waiting"] * 3


# --- the space -----------------------------------------------------------------------------------------------------


def test_a_space_is_edited_replaced_and_written_with_dots_or_nodes():
    def of(*words: str) -> dict:
        plan = check([*SEARCH, *words])
        assert plan.search is not None
        return entries(plan.search)

    assert of() == {"optimizer.lr": Range(1e-4, 1e-1, log=True)}
    assert of(f"{SPACE}.optimizer.lr.low=1e-3") == {"optimizer.lr": Range(1e-3, 1e-1, log=True)}
    both = of(f"{SPACE}.model.depth={{low:1,high:5,step:2}}")
    assert both["model.depth"] == Range(1, 5, step=2)
    assert both["model.depth"].whole
    assert "optimizer.lr" in both
    found = of(f"{SPACE}={{norm:[pre,peri],optimizer.betas:[[0.9,0.95],[0.8,0.9]],model.bias:[true,false]}}")
    assert {key: choice.values for key, choice in found.items()} == {
        "norm": ("pre", "peri"), "optimizer.betas": ("[0.9,0.95]", "[0.8,0.9]"), "model.bias": ("true", "false"),
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, True, 3, 1e-05, "pre", "null", "1", "it's a, b", [1, "a b"], {"a": [1.5]}])
def test_a_word_is_read_back_as_the_value_that_it_was_written_from(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (word,) = OverridesParser.create().parse_overrides([f"key={text(value)}"])
    assert word.value() == value
    assert type(word.value()) is type(value)


def test_values_have_no_more_digits_than_mean_something_and_stay_within():
    assert Range(1e-4, 1e-1, log=True).text(0.00029482640) == "0.0002948"
    assert Range(0.99, 0.9999).text(0.99512345678) == "0.9951235"
    assert Range(0.0, 3.0, step=0.1).text(0.30000000000000004) == "0.3"
    assert Range(0.123456, 0.2).text(0.123456) == "0.123456"
    assert Range(0.12346, 0.2, log=True).text(0.123461) == "0.1235"
    assert Range(0.12346, 0.12349, log=True).text(0.12347) == "0.12349"
    assert Range(1, 9).text(4) == "4"


# --- searches ------------------------------------------------------------------------------------------------------


def test_a_search_asks_for_its_jobs_and_ends_with_the_best_as_words(look, tmp_path, told):  # noqa: F811
    words = ["hparams_search.trials=6", f"{SPACE}.seed=[0,1]", "norm=sandwich", "hparams_search.seed=3"]
    assert look(*SEARCH, *words) == 0
    found, kept = jobs(tmp_path), record(tmp_path)
    assert [job["status"] for job in found] == ["finished"] * 6
    assert kept["base"] == ["norm=sandwich", f"paths.log_dir={tmp_path}"]
    for number, job in enumerate(found):
        assert set(job["params"]) == {"optimizer.lr", "seed"}
        assert 1e-4 <= job["params"]["optimizer.lr"] <= 1e-1
        lr = float(dict(word.split("=") for word in job["overrides"])["optimizer.lr"])
        assert lr == pytest.approx(job["params"]["optimizer.lr"], rel=1e-3)
        assert seen(tmp_path, number)["argv"] == [*job["overrides"], f"paths.run_dir={job['dir']}"]
        loss = 2.0 + int(job["params"]["seed"]) / 10 + abs(math.log10(lr) + 2) / 4
        assert job["metrics"]["val/loss"] == pytest.approx(loss)
    best = min(range(6), key=lambda number: found[number]["metrics"]["val/loss"])
    line = f"python run.py {' '.join(found[best]['overrides'])}"
    assert line in (directory(tmp_path) / "search.md").read_text()
    assert line in told()
    assert "[6/6]" in told()
    for name in ("search.png", "search.csv", "summary.md"):
        assert (directory(tmp_path) / name).is_file()
    check(found[best]["overrides"])


def test_it_learns_from_what_it_is_told():
    """TPE's draws end closer to the best learning rate, 0.01, than draws from -4..-1 without knowledge: 5/6 away."""
    plan = check([*SEARCH, "hparams_search.trials=40"])
    assert plan.search is not None
    study = Suggestions(plan.search, [], [], 1)
    away = []
    for number in range(40):
        params = study.ask(number)
        away.append(abs(math.log10(params["optimizer.lr"]) + 2))
        study.tell(number, {"status": "finished", "metrics": {"val/loss": away[-1]}, "params": params})
    assert study.left == 0
    assert sum(away[20:]) / 20 < 0.6 * 5 / 6
    assert set(study.importances()) == {"optimizer.lr"}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_equal_seeds_suggest_alike(sampler):
    def draws(seed: int, before: int = 0) -> list[float]:
        plan = check([*SEARCH, f"hparams_search.seed={seed}", f"hparams_search.sampler={sampler}"])
        assert plan.search is not None
        study = Suggestions(plan.search, [], [{}] * before, 1)
        return [study.ask(number)["optimizer.lr"] for number in range(3)]

    assert draws(1) == draws(1) != draws(2)
    assert draws(1, before=3)[0] not in draws(1)  # continued, it does not draw the same again


@pytest.mark.slow
def test_jobs_of_a_search_run_at_the_same_time(look, tmp_path):
    assert look(*SEARCH, "hparams_search.trials=3", "schedule.final=3", "sweep.jobs=2") == 0
    assert overlaps(tmp_path, 3) == 2
    assert len({job["params"]["optimizer.lr"] for job in jobs(tmp_path)}) == 3


@pytest.mark.slow
def test_failed_and_diverged_jobs_are_told_as_failed(look, tmp_path):
    space = f"{SPACE}={{norm:[post,mix,pre]}}"
    assert look(*SEARCH, space, "hparams_search.trials=8", "hparams_search.sampler=random") == 1
    ended = {job["params"]["norm"]: job["status"] for job in jobs(tmp_path)}
    assert ended == {"post": "diverged", "mix": "failed", "pre": "finished"}
    assert "optimizer" not in (directory(tmp_path) / "search.md").read_text().split("```")[1]
    number = len([job for job in jobs(tmp_path) if job["status"] == "failed"])
    logs = [
        (directory(tmp_path) / str(n) / "run.log").read_text()
        for n in range(8)
        if jobs(tmp_path)[n]["params"]["norm"] == "post"
    ]
    assert look("mode=search", "sweep.resume=last") == 1  # the failed ones are tried again, diverged ones are not
    assert len(jobs(tmp_path)) == 8
    assert len([job for job in jobs(tmp_path) if job["status"] == "failed"]) == number
    again = [
        (directory(tmp_path) / str(n) / "run.log").read_text()
        for n in range(8)
        if jobs(tmp_path)[n]["params"]["norm"] == "post"
    ]
    assert again == logs


def test_a_suggestion_that_cannot_be_run_is_not_started(look, tmp_path, told):  # noqa: F811
    space = f"{SPACE}={{model.heads:[2,3]}}"
    assert look(*SEARCH, space, "hparams_search.trials=6", "hparams_search.sampler=random") == 1
    for number, job in enumerate(jobs(tmp_path)):
        if job["params"]["model.heads"] == "3":
            assert (job["status"], (directory(tmp_path) / str(number)).exists()) == ("failed", False)
            assert job["reason"].startswith("model.width must be a multiple of model.heads")
        else:
            assert job["status"] == "finished"
    assert {job["status"] for job in jobs(tmp_path)} == {"failed", "finished"}
    assert "cannot be run: model.width must be a multiple" in told()


def test_on_error_stop_ends_a_search(look, tmp_path, told):  # noqa: F811
    assert look(*SEARCH, "norm=mix", "hparams_search.trials=5", "sweep.on_error=stop") == 1
    assert [job["status"] for job in jobs(tmp_path)] == ["failed"]
    assert "the other 4 jobs are not started" in told()


def test_a_metric_that_no_job_ends_with_stops_the_search(look, tmp_path):
    with pytest.raises(
        UserError, match=r"metric=val/los is not among .* did you mean 'val/loss'\?\nthere are: "
    ) as caught:
        look(*SEARCH, "hparams_search.metric=val/los")
    assert len(str(caught.value).splitlines()) == 2
    assert len(jobs(tmp_path)) == 1


@pytest.mark.usefixtures("interruptible")
@pytest.mark.slow
def test_an_interrupted_search_goes_on_with_what_it_knows(look, tmp_path, told, monkeypatch):  # noqa: F811
    helper = interrupt(tmp_path, signal.SIGINT, job="*")
    words = [f"{SPACE}={{norm:[lns,pre],seed:{{low:0,high:9}}}}", "hparams_search.trials=9"]
    assert look(*SEARCH, *words, "hparams_search.sampler=random", "hparams_search.seed=3") == 130
    helper.join()
    before = jobs(tmp_path)
    assert before[-1]["status"] == "interrupted"
    assert f"  python run.py mode=search sweep.resume={directory(tmp_path)}\n" in told()
    with pytest.raises(UserError, match=r"otherwise than with hparams_search\.sampler=tpe"):
        look(*SEARCH, "hparams_search.sampler=tpe", "sweep.resume=last")
    with pytest.raises(UserError, match="norm=pre was asked for"):
        look("mode=search", "sweep.resume=last", "norm=pre")
    monkeypatch.setenv("PATIENT", "1")
    assert look("mode=search", "sweep.resume=last", "sweep.jobs=2") == 0
    after = jobs(tmp_path)
    assert [job["status"] for job in after] == ["finished"] * 9
    assert [job["params"] for job in after[: len(before)]] == [job["params"] for job in before]
    assert seen(tmp_path, len(before) - 1)["argv"][-1] == f"resume={after[len(before) - 1]['dir']}"
    assert look(*SEARCH, "hparams_search.trials=10", "sweep.resume=last") == 0
    assert len(jobs(tmp_path)) == 10
    assert look("-m", "sweep.resume=last") == 0
    assert len(jobs(tmp_path)) == 10


def test_a_sweep_is_no_search(go, look, tmp_path):  # noqa: F811
    assert go("seed=1,2") == 0
    with pytest.raises(UserError, match=r"is a sweep, no search; .* -m sweep\.resume="):
        look("mode=search", "sweep.resume=last")


def test_what_a_search_from_elsewhere_may_not_say(look, tmp_path):
    assert look(*SEARCH, "hparams_search.trials=1") == 0
    path = directory(tmp_path) / "sweep.json"
    kept = record(tmp_path)
    for change, says in [
        ({"base": ["plugins=[evil]", "+callbacks.x={_target_:evil.run}"]}, "evil.run is outside of trainkit"),
        ({"search": kept["search"] | {"space": {"plugins": [["evil"], ["b"]]}}}, "belongs to the whole search"),
        ({"jobs": [kept["jobs"][0] | {"params": {"name": "x"}}]}, "is damaged"),
    ]:
        path.write_text(json.dumps(kept | change))
        with pytest.raises(UserError, match=says):
            look("mode=search", "sweep.resume=last")
