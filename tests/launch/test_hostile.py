"""A run's directory from somebody else: what it holds is never executed, whichever word uses it."""

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import trainkit
from run import main
from tests.test_runs import corpus, door, words  # noqa: F401  # corpus and words are fixtures
from trainkit.launch.explain import UserError

USES = {
    "resume": ["resume={run}", "trainer.max_steps=9"],
    "init_from": ["init_from={run}"],
    "eval": ["mode=eval", "resume={run}"],
    "convert": ["mode=convert", "resume={run}", "to=pre_rms"],
}
SOME = [use if use in ("resume", "init_from") else pytest.param(use, marks=pytest.mark.slow) for use in USES]
TARGETS = {
    "os.system": {"command": "touch {mark}"},
    "builtins.eval": {"_args_": ["open('{mark}', 'w')"]},
    "torch.utils.collect_env.run": {"command": "touch {mark}"},
    "trainkit.launch.sweep.subprocess.run": {"args": ["touch", "{mark}"]},
}


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.fixture
def attack(words, tmp_path, capfd):  # noqa: F811
    """Gives a run to be spoilt, uses it, and checks that it was refused in at most three lines; returns those."""
    victim = trainkit.run([*words, "trainer.max_steps=1"]).dir
    mark = tmp_path / "mark"

    def refused(use: str, spoil) -> str:
        run = tmp_path / "foreign" / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(victim, run)
        spoil(run, mark)
        own = words if use == "init_from" else [word for word in words if word.startswith("paths.")]
        before = sorted((tmp_path / "logs").rglob("*"))
        capfd.readouterr()
        try:
            code = main([*own, *(word.format(run=run) for word in USES[use])])
        except SystemExit as left:
            code = left.code
        told = capfd.readouterr().err
        assert not mark.exists(), "the payload was run"
        assert code == 2, told
        assert 1 <= len(told.splitlines()) <= 3, told
        assert sorted((tmp_path / "logs").rglob("*")) == before
        return told

    return refused


def checkpoint(write):
    """Spoils a run by writing another file in the place of its checkpoints."""

    def spoil(run: Path, mark: Path) -> None:
        for path in (run / "checkpoints").iterdir():
            path.unlink()
        write(run / "checkpoints" / "last.ckpt", mark)

    return spoil


def within_a_state(path: Path, mark: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 1, "x": Payload(mark)}, path)


def without_an_archive(path: Path, mark: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(mark)))


def an_archive_of_another_kind(path: Path, mark: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(mark)))
        archive.writestr("archive/version", "3\n")


def target(name: str, where: str):
    """Spoils a run by a node that calls `name`, at a dotted key of its configuration."""

    def spoil(run: Path, mark: Path) -> None:
        node = {"_target_": name} | yaml.safe_load(yaml.safe_dump(TARGETS[name]).replace("{mark}", str(mark)))
        config = yaml.safe_load((run / "config.yaml").read_text())
        inner = config
        *above, last = where.split(".")
        for key in above:
            inner = inner[key]
        inner[last] = node
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return spoil


def tag(run: Path, mark: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"{text}\nx: !!python/object/apply:os.system ['touch {mark}']\n")


def overrides(run: Path, mark: Path) -> None:
    result = json.loads((run / "result.json").read_text())
    result["overrides"] += ["plugins=[os]", f"+callbacks.x={{_target_:os.system,command:'touch {mark}'}}"]
    (run / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("use", SOME)
def test_a_checkpoint_that_is_a_program_is_not_run(attack, use):
    assert "which could be a program, and nothing of it was run" in attack(use, checkpoint(within_a_state))
    for write in (without_an_archive, an_archive_of_another_kind):
        assert "be read" in attack(use, checkpoint(write))


@pytest.mark.parametrize("use", SOME)
def test_a_configuration_that_calls_something_else_is_refused(attack, use):
    for name in TARGETS:
        for where in ("norm", "callbacks.x"):
            assert name in attack(use, target(name, where))
    assert "config.yaml' cannot be read" in attack(use, tag)


def test_words_that_call_something_else_are_refused(attack):
    assert "os.system may not be called from a configuration" in attack("resume", overrides)


@pytest.mark.slow
def test_a_program_is_not_run_by_the_command_or_by_load(words, tmp_path):  # noqa: F811
    run, mark = trainkit.run([*words, "trainer.max_steps=1"]).dir, tmp_path / "mark"
    checkpoint(within_a_state)(run, mark)
    done = door("mode=eval", f"resume={run}")
    assert (done.returncode, len(done.stderr.splitlines()), mark.exists()) == (2, 1, False), done.stderr
    with pytest.raises(UserError, match="could be a program"):
        trainkit.load(run)
    target("os.system", "norm")(run, mark)
    with pytest.raises(UserError, match=r"os\.system may not be called"):
        trainkit.load(run)
    assert not mark.exists()
