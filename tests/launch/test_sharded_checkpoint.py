"""Checkpoints that every process has written a part of. Whole runs of them are in tests/test_fsdp.py."""

import errno

import pytest
import torch

from trainkit.launch import sharded_checkpoint as shards
from trainkit.launch.checkpoints import damage, newest
from trainkit.launch.explain import UserError

WEIGHT, BIAS = torch.arange(15.0).view(5, 3), torch.arange(1.0)
TAG = "00000003_0123abcd"


def write(path, tag=TAG, processes=3):
    """A checkpoint of a weight of five rows and a bias of one over three processes: 2, 2 and 1 rows; 1, none, none."""
    for rank, (rows, of_bias) in enumerate(zip(WEIGHT.split(2), (BIAS, BIAS[:0], BIAS[:0]), strict=True)):
        file = shards.file_of(path, tag, rank)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": rows.clone(), "b": of_bias.clone()}, file)
    state = {"w": shards.place("w", WEIGHT.shape), "b": shards.place("b", BIAS.shape), "buffer": torch.ones(2)}
    seal = {"tag": tag, "count": processes}
    torch.save({"global_step": 3, "state_dict": state, "list": [state["w"]], shards.SEAL: seal}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return write(folder / "last.ckpt")


def test_whole_tensors_are_read_wherever_they_stand(checkpoint):
    found = shards.read(checkpoint)
    assert torch.equal(found["state_dict"]["w"], WEIGHT)
    assert torch.equal(found["list"][0], WEIGHT)
    assert torch.equal(found["state_dict"]["b"], BIAS)
    assert torch.equal(found["state_dict"]["buffer"], torch.ones(2))
    assert found["global_step"] == 3


@pytest.mark.parametrize(("first", "count"), [(0, 5), (1, 2), (2, 2), (3, 2), (4, 1), (5, 0), (2, 0)])
def test_rows_are_those_of_the_whole(checkpoint, first, count):
    pieces = shards.read(checkpoint, lazily=True)["state_dict"]["w"]
    assert pieces.shape == WEIGHT.shape
    assert torch.equal(pieces.rows(first, count), WEIGHT[first : first + count])


def test_what_was_read_is_nobody_elses(checkpoint):
    shards.read(checkpoint)["state_dict"]["w"].zero_()
    assert torch.equal(shards.whole(shards.read(checkpoint, lazily=True))["state_dict"]["w"], WEIGHT)


def test_a_checkpoint_without_shards_is_read_as_it_is(tmp_path):
    torch.save({"state_dict": {"w": WEIGHT}}, tmp_path / "last.ckpt")
    assert torch.equal(shards.read(tmp_path / "last.ckpt")["state_dict"]["w"], WEIGHT)
    assert shards.files(tmp_path / "last.ckpt") == []


@pytest.mark.parametrize("tag", ["../../elsewhere", "", "00000003_0123abcd/..", 3])
def test_shards_lie_nowhere_else(checkpoint, tag):
    loaded = torch.load(checkpoint, weights_only=True)
    torch.save(loaded | {shards.SEAL: {"tag": tag, "count": 1}}, checkpoint)
    with pytest.raises(ValueError, match="does not say where its shards are"):
        shards.read(checkpoint)
    assert shards.files(checkpoint) == []


def test_shards_of_fewer_processes_are_not_taken_for_all(checkpoint):
    with pytest.raises(ValueError, match="the shards of w are not all of it"):
        shards.read(write(checkpoint, processes=2))


def test_a_damaged_or_missing_shard_is_damage(checkpoint):
    run = checkpoint.parent.parent
    assert damage(checkpoint) is None
    assert newest(run) == (checkpoint, [])
    older = write(checkpoint.with_name("previous.ckpt"), "00000002_0123abcd")
    shard = shards.file_of(checkpoint, TAG, 1)
    data = bytearray(shard.read_bytes())
    data[data.index(WEIGHT[2:4].numpy().tobytes())] ^= 1
    shard.write_bytes(data)
    path, said = newest(run)
    assert path == older
    assert "its shard shards/00000003_0123abcd/1.ckpt is" in said[0]
    assert "does not match its checksum" in said[0]
    shard.unlink()
    assert damage(checkpoint) == f"its shard shards/{TAG}/1.ckpt is No such file or directory"
    shards.file_of(older, "00000002_0123abcd", 0).unlink()
    with pytest.raises(UserError, match="no checkpoint of"):
        newest(run)


def test_shards_that_nobody_names_are_removed(checkpoint):
    folder = checkpoint.parent
    write(folder / "previous.ckpt", "00000002_0123abcd")
    (folder / "best.ckpt").hardlink_to(checkpoint)
    write(folder / "gone.ckpt", "00000001_0123abcd").unlink()
    shards.clear(folder)
    assert sorted(path.name for path in (folder / "shards").iterdir()) == ["00000002_0123abcd", TAG]
    checkpoint.unlink()
    shards.clear(folder)
    assert torch.equal(shards.read(folder / "best.ckpt")["state_dict"]["w"], WEIGHT)


def test_nothing_is_removed_while_a_checkpoint_cannot_be_read(checkpoint, monkeypatch):
    folder = checkpoint.parent
    write(folder / "previous.ckpt", "00000002_0123abcd")
    write(folder / "gone.ckpt", "00000001_0123abcd").unlink()
    load = torch.load

    def stale(path, **options):
        if path.name == "previous.ckpt":
            raise OSError(errno.ESTALE, "Stale file handle")
        return load(path, **options)

    with monkeypatch.context() as broken:
        broken.setattr(torch, "load", stale)
        shards.clear(folder)
    assert len(list((folder / "shards").iterdir())) == 3
    shards.clear(folder)
    assert len(list((folder / "shards").iterdir())) == 2


def test_a_tag_of_a_long_run_is_a_tag(checkpoint):
    tag = shards.new_tag(10**9)
    assert torch.equal(shards.read(write(checkpoint, tag))["state_dict"]["w"], WEIGHT)


def test_rows_are_copied_into_what_is_there(checkpoint):
    target = torch.zeros(5, 3)
    shards.read(checkpoint, lazily=True)["state_dict"]["w"].copy_to(target)
    assert torch.equal(target, WEIGHT)
