"""Schedules drawn before the run: there is a picture, its numbers are those of a run, and mistakes are run.py's."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.test_figures import is_picture
from tests.schedule.earlier import earlier_run
from trainkit.launch.planned import planned
from trainkit.report import __main__ as door
from trainkit.report import schedule
from trainkit.schedule.cosine import cosine
from trainkit.schedule.refined import refine


@pytest.fixture
def drawn(tmp_path, capsys):
    """Draws what some words ask for: the columns of the CSV by name, and the picture."""

    def draw(*words: str) -> tuple[dict[str, list[str]], Path]:
        assert door.main(["schedule", *words, f"paths.log_dir={tmp_path / 'logs'}"]) == 0
        picture, numbers = map(Path, capsys.readouterr().out.split())
        with numbers.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {name: [row[name] for row in rows] for name in rows[0]}, picture

    return draw


def test_one_schedule(drawn, tmp_path):
    columns, picture = drawn("schedule=cosine", "schedule.warmup=0.1", "optimizer.lr=2e-3", "trainer.max_steps=50")
    factor = cosine(total=50, warmup=0.1)
    assert list(map(int, columns["step"])) == list(range(1, 51))
    assert list(map(float, columns["lr"])) == [2e-3 * factor(step) for step in range(50)]
    assert picture == tmp_path / "logs" / "schedules" / "cosine.png"
    assert is_picture(picture)


def test_several_in_one_picture_each_with_the_keys_it_has(drawn, tmp_path):
    run = earlier_run(tmp_path / "run", [3.0, 2.0, 1.0, 1.0, 2.0] * 4)
    words = ["schedule=linear,wsd,refined", "schedule.decay=0.5", "schedule.warmup=0", f"schedule.from_run={run}"]
    columns, picture = drawn(*words, "optimizer=sgd", "optimizer.lr=1", "trainer.max_steps=20")
    assert list(columns) == ["step", "lr linear", "lr wsd", "lr refined"]
    assert list(map(float, columns["lr linear"])) == [1 - step / 20 for step in range(20)]
    assert [float(rate) for rate in columns["lr wsd"]][:11] == [1.0] * 11
    assert list(map(float, columns["lr refined"])) == refine([3.0, 2.0, 1.0, 1.0, 2.0] * 4)
    assert is_picture(picture)


def test_other_keys_may_vary_and_lengths_differ(drawn):
    columns, _ = drawn("schedule=linear", "trainer.max_steps=10,20", "optimizer.lr=1", "schedule.warmup=0", "-m")
    assert columns["lr trainer.max_steps=10"][9:] == ["0.09999999999999998", *[""] * 10]
    assert len(columns["lr trainer.max_steps=20"]) == 20


def test_the_total_of_the_schedule_may_be_another(drawn):
    columns, _ = drawn("schedule=linear", "schedule.total=5", "trainer.max_steps=10", "optimizer.lr=1")
    assert [float(rate) for rate in columns["lr"]][5:] == [0.0] * 5
    columns, _ = drawn("schedule=linear", "schedule.total=5", "trainer.max_steps=-1", "trainer.max_epochs=1")
    assert len(columns["lr"]) == 5


def test_a_long_run_is_drawn_at_some_of_its_steps(drawn):
    columns, picture = drawn("trainer.max_steps=1000000")
    assert (columns["step"][0], columns["step"][-1], len(columns["step"])) == ("1", "1000000", schedule.POINTS)
    assert is_picture(picture)
    assert [len(set(schedule.shown(n))) for n in (1, 2, 30_000)] == [1, 2, schedule.POINTS]


def test_many_curves_are_drawn(tmp_path):
    (plan,) = planned(["trainer.max_steps=50"])
    plans = [replace(plan, label=str(peak), peak=float(peak)) for peak in range(40)]
    picture, numbers = schedule.draw(plans, tmp_path / "many.png")
    assert is_picture(picture)
    assert numbers.read_text().splitlines()[0].endswith(",lr 38,lr 39")


def test_a_run_of_one_step(drawn):
    columns, picture = drawn("trainer.max_steps=1", "optimizer.lr=1")
    assert columns == {"step": ["1"], "lr": ["1.0"]}
    assert is_picture(picture)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["schedule=cosin"], "did you mean 'cosine'?"),
        (["schedule=linear,cosin"], "did you mean 'cosine'?"),
        (["schedule.decay=0.1"], "schedule.decay exists with schedule=wsd; chosen is schedule=linear"),
        (["schedule=linear,wsd", "schedule.decya=0.1"], "no key 'schedule.decya'"),
        (["schedule.warmup=2000"], "schedule.warmup must lie between 0 and the run's 1500 steps; got 2000"),
        (["schedule=refined"], "schedule.from_run must be given"),
        (["schedule=refined", "schedule.from_run=nowhere"], "schedule.from_run=nowhere: does not exist"),
        (["trainer.max_steps=-1", "trainer.max_epochs=1"], "add trainer.max_steps=N"),
        (["cosine"], "did you mean 'schedule=cosine'?"),
        (["--cfg", "job"], "takes no flags"),
    ],
)
def test_a_mistake_is_said_in_the_words_of_run_py_and_nothing_is_written(words, says, tmp_path, capsys):
    assert door.main(["schedule", *words, f"paths.log_dir={tmp_path / 'logs'}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert says in said.err
    assert 1 <= len(said.err.splitlines()) <= 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to(capsys):
    assert door.main(["schedule", "paths.log_dir=/proc/logs"]) == 2
    assert "paths.log_dir: cannot write" in capsys.readouterr().err


def test_the_door(capsys):
    for argv in ([], ["shcedule"], ["catalogue", "x"]):
        assert door.main(argv) == 2
        assert "usage: python -m trainkit.report" in capsys.readouterr().err
    assert door.main(["schedule", "--help"]) == 0
    assert "schedule=linear,cosine,wsd" in capsys.readouterr().out


def test_the_rate_of_an_optimizer_within_another():
    (plan,) = planned(["optimizer=sam", "optimizer.base.lr=0.25", "schedule=constant", "schedule.warmup=0"])
    assert plan.rate(7) == 0.25


def test_a_label_says_what_differs():
    plans = planned(["schedule=linear,cosine", "optimizer.lr=1e-3,2e-3", "seed=3"])
    assert [plan.label for plan in plans][:2] == ["linear optimizer.lr=0.001", "linear optimizer.lr=0.002"]
    assert planned(["seed=3"])[0].label == "linear"
