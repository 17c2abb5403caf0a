"""What processes of one run must agree on, and what their launcher says. Whole runs are in tests/test_ranks.py."""

import json
import os
import sys

import pytest

from trainkit.launch.preflight import UserError, check
from trainkit.launch.process import standby
from trainkit.launch.process.launched import OF_A_TASK, Launch, adopt, check_launch, launched
from trainkit.launch.process.ranks import disagreement
from trainkit.launch.sources import RUN

VARIABLES = (*OF_A_TASK, "SLURM_NNODES", "SLURM_JOB_NAME", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3"}
SRUN = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_NAME": "train"}


@pytest.fixture
def environment(monkeypatch):
    def put(**values: str) -> None:
        for name in (*VARIABLES, "TORCHELASTIC_RUN_ID"):
            monkeypatch.setenv(name, "")  # so that it is restored, whoever changes it
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def everyone(world=2, /, **changes):
    """What `world` processes that share data answer; changes: of the last one."""
    share = {"world": world, "micro_batch": 4, "accumulation": 1, "items": 100, "position": {"epoch": 0, "step": 3}}
    found = [(rank, world, {"rank": rank} | share) for rank in range(world)]
    rank, believed, last = found[-1]
    believed = changes.pop("believed", believed)
    return [*found[:-1], (rank, believed, last | changes)]


def test_processes_that_share_their_data_agree():
    disagreement(everyone(1), 1)
    disagreement(everyone(3), 3)
    disagreement([(rank, world, None) for rank, world, _ in everyone(2)], 2)  # a loader of the user's own


@pytest.mark.parametrize(
    ("found", "wanted", "says"),
    [
        (everyone(2)[:1], 2, "this run is of 2 process.* rank 0 believes in 2 where 1 answered"),
        (everyone(2), 1, "this run is of 1 process.* believes in 2 where 2 answered"),
        (everyone(2, believed=1), 2, "rank 1 believes in 1 where 2 answered"),
        (everyone(2, rank=0), 2, "rank 1 of 2 reads part 0 of 2"),
        (everyone(2, world=1), 2, "rank 1 of 2 reads part 1 of 1"),
        (everyone(2, items=99), 2, "ranks 0 and 1 read different data"),
        (everyone(2, position={"epoch": 0, "step": 4}), 2, "ranks 0 and 1 read different data"),
        (everyone(2)[:1] * 2, 2, r"the ranks of this run are \[0, 0\]"),
    ],
)
def test_processes_that_do_not_are_told_apart(found, wanted, says):
    with pytest.raises(ValueError, match=says) as caught:
        disagreement(found, wanted)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, None),
        (TORCHRUN, Launch(4, 2, "torchrun")),
        (SRUN, Launch(4, 2, "srun")),
        (SRUN | {"SLURM_JOB_NAME": "bash"}, None),
        (SRUN | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "4"}, None),  # an allocation in which nothing was launched
    ],
)
def test_who_started_this_process(environment, values, found):
    environment(**values)
    assert launched() == found


def test_sruns_ranks_get_their_name_and_an_allocation_is_hidden(environment):
    environment(**SRUN)
    adopt()
    assert (os.environ["RANK"], os.environ["SLURM_NTASKS_PER_NODE"]) == ("3", "2")
    environment(**SRUN | {"SLURM_NTASKS": "1"})
    adopt()
    assert not {*OF_A_TASK, "RANK"} & set(os.environ)


@pytest.mark.parametrize("values", [TORCHRUN, SRUN])
def test_a_launch_of_another_size_is_refused_with_what_to_type(environment, values):
    environment(**values)
    check_launch({"devices": 2, "num_nodes": 2, "strategy": "ddp"})
    for settings in ({"devices": 2, "strategy": "ddp"}, {"devices": 2, "num_nodes": 2}, {"devices": 1}):
        with pytest.raises(UserError, match=r"started 4 processes.*\nsay trainer=ddp trainer\.devices=2 trainer\.num"):
            check_launch(settings)


def test_a_launcher_decides_how_many_jobs_run():
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'trainkit[joblib]'")
    with pytest.raises(UserError, match=r"sweep\.jobs=2 is for a sweep without a launcher"):
        check(["-m", "hydra/launcher=joblib", "norm=pre,peri", "sweep.jobs=2"])


# --- ranks that wait ----------------------------------------------------------------------------------------------

WAITS = """
import json, os, sys
from pathlib import Path
from trainkit.launch.process import standby

words = standby.told(sys.argv[1:], "trainkit.launch.explain")
found = {"words": words, "rank": os.environ["LOCAL_RANK"], "waiting": standby.WAITING in os.environ}
Path(words[0]).write_text(json.dumps(found | {"loaded": "trainkit.launch.explain" in sys.modules, "path": sys.path}))
"""


@pytest.fixture
def waiting(tmp_path, monkeypatch):
    """The standby of a run of two ranks, and the file to which a rank writes what it was told."""
    script = tmp_path / "run.py"
    script.write_text(WAITS)
    monkeypatch.setattr(standby, "RUN", script)
    for name in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(RUN.parent))
    standby.start({"mode": "train", "trainer": {"strategy": "ddp", "devices": 2}}, ["seed=1"])
    process = standby._waiting[1]
    assert process.args[2:] == ["seed=1"]  # as ps shows it
    yield process, tmp_path / "told.json"
    standby._waiting.clear()
    process.kill()
    process.wait()


def test_a_rank_that_waits_becomes_the_one_that_is_asked_for(waiting):
    process, file = waiting
    rank = standby.rank(1, [str(file)], os.environ)
    assert rank is process
    assert rank.wait(timeout=100) == 0
    found = json.loads(file.read_text())
    assert (found["words"], found["rank"], found["waiting"], found["loaded"]) == ([str(file)], "1", False, True)
    assert found["path"] == [os.path.abspath(folder) for folder in sys.path]


def test_a_rank_that_waits_ends_where_there_is_no_run(waiting):
    process, file = waiting
    process.stdin.close()
    assert process.wait(timeout=100) == 0
    assert not file.exists()


def test_a_rank_that_was_killed_while_it_waited_is_started_anew(waiting):
    process, file = waiting
    process.kill()
    process.wait()
    rank = standby.rank(1, [str(file)], os.environ)
    assert rank is not process
    assert rank.wait(timeout=100) == 0
    assert json.loads(file.read_text())["rank"] == "1"


@pytest.mark.parametrize(
    "cfg",
    [
        {"mode": "train", "trainer": {"devices": 2}},
        {"mode": "eval", "trainer": {"strategy": "ddp", "devices": 2}},
        {"mode": "train", "trainer": {"strategy": "ddp", "devices": 1}},
        {"mode": "train", "trainer": {"strategy": "ddp", "devices": "auto"}},
    ],
)
def test_no_rank_waits_for_a_run_of_one_process_or_of_an_unknown_number(cfg):
    standby.start(cfg, [])
    assert standby._waiting == {}


def test_a_further_rank_has_none_waiting_for_it(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    standby.start({"mode": "train", "trainer": {"strategy": "ddp", "devices": 2}}, [])
    assert standby._waiting == {}
