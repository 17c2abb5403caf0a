"""A disk that is full or read-only: one clear error, and what was saved before is intact."""

import errno
import json
import os
import subprocess
from io import FileIO

import pytest
import torch

from callbacks.checkpoint import LastAndBest
from tests.callbacks.toy import fit
from tests.test_runs import corpus, door, words  # noqa: F401  # fixtures
from trainkit.launch.checkpoint_file import InPlace
from trainkit.launch.checkpoints import damage, found
from trainkit.launch.disk import DiskError, writing
from trainkit.launch.loggers import CsvLogger, JsonlLogger
from trainkit.launch.trainer import trainer

REASONS = {errno.ENOSPC: "the disk is full", errno.EROFS: "the file system has become read-only"}


@pytest.mark.parametrize("number", REASONS)
@pytest.mark.parametrize("place", ["write", "replace", "fsync"])
def test_a_save_that_fails_leaves_the_ones_before(tmp_path, monkeypatch, number, place):
    fit(tmp_path, [LastAndBest(every_n_steps=2)], max_steps=4)
    before = {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    assert set(before) == {"last.ckpt", "previous.ckpt", "best.ckpt"}

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    if place == "write":
        monkeypatch.setattr(torch, "save", lambda checkpoint, file: (file.write(b"half"), fail()))
    else:
        monkeypatch.setattr(os, place, fail)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(DiskError) as caught:
        fit(tmp_path, [LastAndBest(every_n_steps=2)], checkpoint=last, max_steps=8)
    assert REASONS[number] in str(caught.value)
    assert str(last) in str(caught.value)
    assert f"resume={tmp_path}" in str(caught.value)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_what_goes_wrong_in_the_file_is_not_hidden_by_torch():
    """/dev/full takes no byte; torch itself says RuntimeError."""
    with pytest.raises(OSError, match="No space left") as caught:
        InPlace().save_checkpoint({"weights": torch.zeros(10_000)}, "/dev/full")
    assert caught.value.errno == errno.ENOSPC


def test_every_trainer_reads_and_writes_so():
    assert type(trainer(max_steps=1, accelerator="cpu").strategy.checkpoint_io) is InPlace  # without a callback too


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log, table = JsonlLogger(tmp_path), CsvLogger(tmp_path)
    for logger in (log, table):
        logger.log_metrics({"a": 1.0}, 1)
    log._file = FileIO("/dev/full", "w")
    table.path.unlink()
    table.path.symlink_to("/dev/full")
    for logger in (log, table):
        with pytest.raises(DiskError, match=rf"cannot write .*{logger.path.name}: the disk is full"):
            logger.log_metrics({"a": 1.0}, 2)
        logger.finalize("failed")


def test_other_errors_are_left_as_they_are(tmp_path):
    with pytest.raises(PermissionError), writing(tmp_path, tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 1_000_000])  # for the next line of the log; for it, and half a checkpoint
def test_a_run_on_a_disk_that_fills_up(words, small_disk, room):  # noqa: F811
    argv = [*words, f"paths.log_dir={small_disk}", "model.width=64", "callbacks.checkpoint.every_n_steps=2"]
    first = door(*argv, "trainer.max_steps=4")
    assert first.returncode == 0, first.stderr
    (run,) = (path.parent for path in small_disk.rglob("result.json"))
    free = os.statvfs(small_disk)
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        try:
            file.write(b"x" * max(0, free.f_bavail * free.f_frsize - min(room, 300_000)))
            file.flush()
        except OSError:
            pass
    before = {path: path.read_bytes() for path in found(run / "checkpoints")}
    done = door(f"resume={run}", "trainer.max_steps=300", "trainer.log_every_n_steps=1")
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "No space left" in done.stderr or "the disk is full" in done.stderr
    assert "Logging error" not in done.stderr
    assert all(damage(path) is None for path in found(run / "checkpoints"))
    assert len(before) == len(found(run / "checkpoints"))
    filler.unlink()
    done = door(f"resume={run}", "trainer.max_steps=10")
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
