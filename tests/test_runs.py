"""Whole runs through the user's door."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import trainkit
from trainkit.launch import rundir
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import check
from trainkit.launch.process import machine
from trainkit.launch.resume import recorded
from trainkit.report.metrics_file import read

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.depth=2", "model.width=16", "model.heads=2", "model.context=16", "data.batch_size=4",
    "data.val_batches=1", "data.test_batches=1", "trainer.log_every_n_steps=2", "trainer.threads=1",
]  # fmt: skip


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(400)))
    return path


@pytest.fixture
def words(tmp_path, corpus):
    folders = [f"paths.log_dir={tmp_path / 'logs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    return [*SMALL, "data=text", f"data.path={corpus}", "logger=none", "trainer.max_steps=6", *folders]


def door(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | environment
    return subprocess.run([sys.executable, "run.py", *argv], cwd=ROOT, env=env, capture_output=True, text=True)


DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def outside() -> dict[str, str]:
    """The environment of a process that is started somewhere else."""
    return {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"PYTHONPATH": str(ROOT)}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read(run / "metrics.jsonl") if "train/loss" in line]


def test_a_run_leaves_what_the_readme_promises(words):
    result = trainkit.run(["model=gpt", "norm=peri", *words])
    run = result.dir
    assert result.status == "finished"
    written = json.loads((run / "result.json").read_text())
    assert written["status"] == "finished"
    assert written["metrics"]["val/loss"] == result.metrics["val/loss"]
    assert written["versions"]["torch"]
    # AdamW: two numbers of 4 bytes per parameter, and a step count of 4 bytes per tensor
    assert written["optimizer_state_bytes"] == 8 * written["parameters"] + 4 * 30
    assert written["seconds"] > 0
    assert {f"figures/grad_norm_{kind}.png" for kind in ("heatmap", "profile")} <= set(written["figures"])
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["vocab"] == 256
    assert config["task"]["model"]["norm"]["_target_"] == "trainkit.norm.peri.Peri"
    assert [step for step, _ in losses(run)] == [1, 2, 4, 6]
    names = {name for line in read(run / "metrics.jsonl") for name in line}
    assert {"grad_norm/global", "grad_norm/clipped", "grad_norm/blocks.1.attn", "grad_norm/embed", "lr"} <= names
    assert (run / "run.log").read_text().count("val/loss") >= 1
    torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_last_step_is_validated_and_checkpointed(words):
    run = trainkit.run([*words, "trainer.val_check_interval=4"]).dir
    assert [line["step"] for line in read(run / "metrics.jsonl") if "val/loss" in line] == [4, 6]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6


def test_equal_seeds_give_equal_bits_and_other_seeds_do_not(words):
    first, second, third = (trainkit.run([*words, f"seed={seed}"]).dir for seed in (1, 1, 2))
    assert losses(first) == losses(second) != losses(third)


def test_resume_continues_in_place_as_if_never_stopped(words):
    unbroken = trainkit.run([*words, "trainer.max_steps=10", "schedule=constant", "model.dropout=0.1"]).dir
    run = trainkit.run([*words, "trainer.max_steps=4", "schedule=constant", "model.dropout=0.1"]).dir
    resumed = trainkit.run([f"resume={run}", "trainer.max_steps=10"])
    assert resumed.dir == run
    assert losses(run) == losses(unbroken)
    a, b = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (run, unbroken))
    assert all(torch.equal(a["state_dict"][k], v) for k, v in b["state_dict"].items())


def test_a_run_that_goes_on_after_its_end_has_the_rates_of_the_longer_schedule(words):
    """Not for its first step the rate that the shorter one ended with, which is 0."""
    words = [*words, "schedule=linear", "schedule.warmup=0", "trainer.log_every_n_steps=1"]
    whole, run = (trainkit.run([*words, f"trainer.max_steps={steps}"]).dir for steps in (6, 3))
    trainkit.run([f"resume={run}", "trainer.max_steps=6"])

    def rates(directory):
        rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["lr"] for row in rows if "lr" in row and row["step"] > 3}

    assert rates(run) == rates(whole)
    assert len(rates(run)) == 3
    assert all(rates(run).values())


def test_a_run_that_was_killed_after_its_last_step_resumes_to_its_result(words):
    whole = trainkit.run(words)
    result = json.loads((whole.dir / "result.json").read_text())
    killed = {k: v for k, v in result.items() if k not in ("metrics", "seconds")} | {"status": "running"}
    (whole.dir / "result.json").write_text(json.dumps(killed))
    assert trainkit.run([f"resume={whole.dir}"]).metrics == whole.metrics


def test_a_live_run_cannot_be_resumed(words):
    run = trainkit.run(words).dir
    held = rundir.lock(run)
    for word in ("trainer.max_steps=10", "seed=0"):
        with pytest.raises(UserError, match="is in use by a live run; wait for it or stop it first") as caught:
            trainkit.run([f"resume={run}", word])
        assert "\n" not in str(caught.value)
    rundir.unlock(held)


def test_threads_are_recorded_and_kept(words, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(machine, "cores", lambda: 3)
    run = trainkit.run([*words, "trainer.threads=null", "trainer.max_steps=2"]).dir
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["threads"] == torch.get_num_threads() == 3
    monkeypatch.setattr(machine, "cores", lambda: 1)
    trainkit.run([f"resume={run}", "trainer.max_steps=4"])
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["threads"] == torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_a_csv_log_goes_on_in_the_same_file(words):
    run = trainkit.run([*words, "logger=csv", "trainer.max_steps=4"]).dir
    trainkit.run([f"resume={run}", "trainer.max_steps=8"])
    with (run / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row["train/loss"])) for row in csv.DictReader(file) if row["train/loss"]]
    assert rows == losses(run)


def test_words_about_a_replaced_choice_are_not_remembered(words):
    run = trainkit.run([*words, "schedule=linear", "schedule.final=0.5"]).dir
    with pytest.raises(UserError, match=r"resume continues a run with data\."):  # not that data has no key 'path'
        trainkit.run([f"resume={run}", "data=python_source"])
    for schedule, final in (("linear", 0.5), ("constant", None)):
        plan = recorded(check([f"resume={run}", f"schedule={schedule}", "trainer.max_steps=8"]))
        assert plan.configs[0].schedule.get("final") == final
        assert plan.configs[0].data.path


def test_todays_words_are_compared_with_the_run_and_not_with_the_defaults(words, corpus):
    run = trainkit.run([*words, "optimizer=sam", "optimizer.rho=0.1"]).dir
    plan = recorded(check([f"resume={run}", f"data.path={corpus}", "optimizer.rho=0.2", "trainer.max_steps=8"]))
    assert (plan.configs[0].optimizer.rho, plan.configs[0].trainer.max_steps) == (0.2, 8)
    assert plan.typed == [f"resume={run}", f"data.path={corpus}", "optimizer.rho=0.2", "trainer.max_steps=8"]
    plan = recorded(check([f"resume={run}", "optimizer/base=lion", "optimizer.base.lr=0.01"]))
    assert (plan.configs[0].choices["optimizer/base"], plan.configs[0].optimizer.base.lr) == ("lion", 0.01)
    assert plan.configs[0].optimizer.rho == 0.1
    with pytest.raises(UserError, match=r"optimizer\.base\._target_=torch\.optim\.AdamW, and .*Lion was asked for"):
        trainkit.run([f"resume={run}", "optimizer/base=lion"])
    for word, says in (
        ("optimizer.rhoo=1", r"optimizer\.rho'"),
        ("data.path=[", "cannot read"),
        ("norm=perl", "'peri'"),
    ):
        with pytest.raises(UserError, match=says):
            recorded(check([f"resume={run}", word]))


def result_of(tmp_path: Path, *overrides: str) -> Path:
    """A run's directory with nothing in it but what was asked for."""
    run = tmp_path / "run"
    run.mkdir()
    chosen = dict(check(list(overrides)).configs[0].choices)
    (run / "result.json").write_text(json.dumps({"overrides": overrides, "choices": chosen}, default=str))
    (run / "config.yaml").write_text("mode: train\n")
    return run


def test_recorded_words_go_with_the_choice_that_they_are_about(tmp_path):
    run = result_of(tmp_path, "optimizer=sam", "optimizer/base=lion", "optimizer.base.lr=0.01", "optimizer.rho=0.2")
    plain = recorded(check([f"resume={run}", "optimizer=adamw", "optimizer.lr=0.5"])).configs[0]
    assert (plain.choices.optimizer, plain.optimizer.lr) == ("adamw", 0.5)
    other = recorded(check([f"resume={run}", "optimizer/base=adamw"])).configs[0]
    assert (other.choices["optimizer/base"], other.optimizer.rho) == ("adamw", 0.2)
    assert other.optimizer.base.lr != 0.01
    same = recorded(check([f"resume={run}", "optimizer=sam"])).configs[0]
    assert (same.choices["optimizer/base"], same.optimizer.base.lr) == ("lion", 0.01)


@pytest.mark.parametrize(
    ("word", "value"),
    [("callbacks.rate.step=2", 2), ("+callbacks.rate.step=3", 3), ("~callbacks.rate.step", None), ("seed=1", 1)],
)
def test_an_added_key_is_set_or_deleted_by_its_own_name(tmp_path, word, value):
    added = ["plugins=[tests]", "+callbacks.rate._target_=tests.launch.witness.Fail", "+callbacks.rate.step=1"]
    run = result_of(tmp_path, *added)
    node = recorded(check([f"resume={run}", "plugins=[tests]", word])).configs[0].callbacks.rate
    assert node.get("step") == value


@pytest.mark.slow
def test_a_job_that_slurm_puts_back_goes_on_with_its_run(words, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    whole = trainkit.run(words)
    path = whole.dir / "result.json"
    result = json.loads(path.read_text())
    assert result["slurm"] == {"job": "7_1", "words": words}
    killed = {k: v for k, v in result.items() if k not in ("metrics", "seconds")} | {"status": "running"}
    path.write_text(json.dumps(killed))

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = trainkit.run(words)
    assert (again.dir, again.metrics) == (whole.dir, whole.metrics)
    assert json.loads(path.read_text())["overrides"][: len(words)] == words
    before = path.read_bytes()
    assert trainkit.run(words).dir == whole.dir  # finished: the script of the job is at its next line
    assert path.read_bytes() == before

    def runs() -> int:
        return len(list((tmp_path / "logs").rglob("result.json")))

    assert trainkit.run([*words, "seed=1"]).dir != whole.dir  # another line of the same script
    assert runs() == 2
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert trainkit.run(words).dir != whole.dir  # another task of the array
    assert runs() == 3
    named = [*words, f"paths.run_dir={tmp_path / 'named'}"]  # as the jobs of a sweep are
    first = trainkit.run(named)
    (first.dir / "result.json").write_text((first.dir / "result.json").read_text().replace("finished", "failed"))
    assert trainkit.run(named).dir == first.dir
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    with pytest.raises(UserError, match="is not empty"):
        trainkit.run(named)


@pytest.mark.slow
def test_a_script_that_asks_for_two_processes_is_not_run_twice(words, tmp_path):
    lines = ["import trainkit", "print('begins')", f"print(trainkit.run({[*words, *DDP]!r}).metrics['val/loss'])"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, env=outside(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("begins") == 1
    (run,) = (path.parent for path in (tmp_path / "logs").rglob("result.json"))
    assert float(done.stdout.split()[-1]) == json.loads((run / "result.json").read_text())["metrics"]["val/loss"]


def test_a_prompt_cannot_start_processes_and_says_what_can(words, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    with pytest.raises(
        UserError, match=r"which an interactive session cannot\ncall python run\.py with the same words"
    ):
        trainkit.run([*words, *DDP])


def test_resume_refuses_another_model_or_optimizer(words):
    run = trainkit.run([*words, "optimizer=muon"]).dir
    for other, key in (
        ("model.depth=3", "model.depth=2, and model.depth=3"),
        ("optimizer=lion", "optimizer._target_=trainkit.optimizer.muon.Muon"),
        ("optimizer/rest=lion", "optimizer.rest._target_=torch.optim.AdamW"),
        ("optimizer.takes=[matrix,head]", "optimizer.takes=['matrix']"),
        ("optimizer.rest.lr=0.5", "optimizer.rest.lr=0.0003"),
    ):
        with pytest.raises(UserError, match=re.escape(f"resume continues a run with {key}")):
            trainkit.run([f"resume={run}", other])


@pytest.mark.slow
def test_a_word_that_cannot_work_leaves_the_run_as_it_was(words):
    run = trainkit.run(words).dir
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "result.json")}

    def unchanged() -> bool:
        return all((run / name).read_bytes() == content for name, content in before.items() if name != "result.json")

    for word in ("data.batch_size=2", "optimizer=sgd", "schedule.warmup=-3", "trainer.max_steps=3"):
        with pytest.raises(UserError):
            trainkit.run([f"resume={run}", "trainer.max_steps=10", word])
        assert unchanged(), word
        assert json.loads((run / "result.json").read_text()) == json.loads(before["result.json"]), word
    assert trainkit.run([f"resume={run}", "trainer.max_steps=8"]).metrics["val/loss"] > 0


def test_a_damaged_checkpoint_is_named(words):
    run = trainkit.run(words).dir
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])  # best.ckpt is the same file
    with pytest.raises(
        UserError, match=r"no checkpoint of .* can be read: last\.ckpt, best\.ckpt are damaged"
    ) as caught:
        trainkit.run([f"resume={run}", "trainer.max_steps=10"])
    assert "put back a copy" in str(caught.value)


def test_a_folder_with_other_things_in_it_is_not_written_to(words, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.yaml").write_text("precious")
    with pytest.raises(UserError, match="is not empty"):
        trainkit.run([*words, f"paths.run_dir={tmp_path / 'mine'}"])
    assert (tmp_path / "mine" / "config.yaml").read_text() == "precious"


def test_eval_finds_the_run_where_it_is_told_to_look(words, tmp_path):
    run = trainkit.run(words).dir
    assert trainkit.run([f"paths.log_dir={tmp_path / 'logs'}", "mode=eval", "resume=last"]).dir == run / "eval"


def test_eval_reports_the_runs_own_model_and_leaves_its_metrics_alone(words):
    result = trainkit.run(["norm=post", *words])
    before = (result.dir / "metrics.jsonl").read_text()
    evaluated = trainkit.run(["mode=eval", f"resume={result.dir}"])
    assert evaluated.dir == result.dir / "eval"
    assert evaluated.metrics["val/loss"] == pytest.approx(result.metrics["val/loss"], rel=1e-6)
    assert (result.dir / "metrics.jsonl").read_text() == before


def test_every_evaluation_is_kept(words):
    run = trainkit.run(words).dir
    first = trainkit.run(["mode=eval", f"resume={run}"])
    kept = (first.dir / "result.json").read_bytes()
    second = trainkit.run(["mode=eval", f"resume={run}", "checkpoint=best"])
    assert [result.dir for result in (first, second)] == [run / "eval", run / "eval_2"]
    assert (first.dir / "result.json").read_bytes() == kept
    assert json.loads((second.dir / "result.json").read_text())["overrides"][-1] == "checkpoint=best"


def test_init_from_starts_a_new_run_from_old_weights(words):
    first = trainkit.run(words)
    second = trainkit.run([*words, f"init_from={first.dir}", "trainer.max_steps=1"])
    assert second.dir != first.dir
    assert losses(second.dir)[0][1] < losses(first.dir)[0][1]


def test_accumulation_gives_the_same_training(words):
    whole, parts = (
        trainkit.run([*words, f"trainer.accumulate_grad_batches={n}", "trainer.precision=64-true"]).dir for n in (1, 2)
    )
    for (step, a), (other, b) in zip(losses(whole), losses(parts), strict=True):
        assert step == other
        assert a == pytest.approx(b, rel=1e-9)


def test_a_sweep_gives_its_job_a_run_of_its_own(words, tmp_path):
    """Through the door; sweeps of several jobs are in tests/launch/test_sweep.py."""
    done = door("-m", "norm=peri", *words, "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "logs").rglob("sweep.json")
    jobs = json.loads(sweep.read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["finished"]
    assert yaml.safe_load((sweep.parent / "0" / "config.yaml").read_text())["choices"]["norm"] == "peri"
    assert "val/loss" in done.stdout


MISTAKES = {
    "a missing corpus": (["data.path={tmp}/nowhere.txt"], "data.path"),
    "an empty corpus": (["data.path={tmp}/empty.txt"], "empty"),
    "a corpus shorter than one context": (["data.path={tmp}/short.txt"], "context"),
    "undecodable bytes": (["data.path={tmp}/bytes.txt"], "UTF-8"),
    "a batch that does not divide": (["trainer.accumulate_grad_batches=3"], "data.batch_size"),
    "heads that do not divide": (["model.heads=3"], "model.heads"),
    "a context beyond the model's": (["data.context=64"], "context"),
    "an unwritable log directory": (["paths.log_dir=/proc/logs"], "paths.log_dir"),
    "a resume directory that is no run": (["resume={tmp}"], "no run directory"),
    "no end": (["trainer.max_steps=-1"], "trainer.max_steps"),
    "a metric that is not validated": (
        ["callbacks.checkpoint.monitor=val/lss"],
        r"callbacks\.checkpoint\.monitor=val/lss .*'val/loss'.*\nthere are: val/bits_per_byte, val/loss",
    ),
    "a name that leads elsewhere": (["name=../../x"], r"name=\.\./\.\./x leads out of paths\.log_dir"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_bad_input_is_one_sentence_and_leaves_the_disk_alone(mistake, words, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "bytes.txt").write_bytes(b"abc \xff\xfe" * 1000)
    before = sorted((tmp_path / "logs").rglob("*"))
    extra, says = MISTAKES[mistake]
    with pytest.raises(UserError, match=says) as error:
        trainkit.run([*words, *(word.format(tmp=tmp_path) for word in extra)])
    assert str(error.value).count("\n") <= 2
    assert sorted((tmp_path / "logs").rglob("*")) == before


def test_a_mistake_exits_with_2_and_no_traceback(words):
    done = door(*words, "model.heads=3")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "model.width must be a multiple of model.heads" in done.stderr


def test_a_failure_exits_with_1_and_says_so_on_disk(words, tmp_path):
    done = door(*words, "optimizer=sgd", "optimizer.lr=1e30", "gradient=none", "trainer.max_steps=20")
    assert done.returncode == 1
    (result,) = (tmp_path / "logs").rglob("result.json")
    written = json.loads(result.read_text())
    assert written["status"] == "failed"
    assert "NonFiniteLoss" in written["reason"]
    assert "Traceback" in (result.parent / "run.log").read_text()


@pytest.mark.slow
def test_a_norm_layer_that_nothing_uses_is_one_warning(words):
    run = door("norm=rezero", "norm_layer=dyt", *words, "trainer.max_steps=1")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("norm_layer=dyt is used by no module") == 1
