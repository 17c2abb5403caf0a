"""The last few checkpoints, how damage is found, and what a run goes on from then."""

import os

import pytest
import torch

import trainkit
from callbacks.checkpoint import LastAndBest
from tests.callbacks.test_checkpoint import load, same
from tests.callbacks.toy import Toy, fit
from tests.test_runs import corpus, losses, words  # noqa: F401  # fixtures
from trainkit.launch.checkpoints import damage, found, kept, newest
from trainkit.launch.explain import UserError


def steps(folder):
    return {path.name: load(folder, path.stem)["global_step"] for path in (folder / "checkpoints").iterdir()}


@pytest.mark.parametrize(
    ("keep", "there"),
    [
        (1, {"last": 12}),
        (2, {"last": 12, "previous": 10}),
        (4, {"last": 12, "previous": 10, "previous_2": 8, "previous_3": 6}),
    ],
)
def test_the_last_so_many_are_kept(tmp_path, keep, there):
    fit(tmp_path, [LastAndBest(every_n_steps=2, keep=keep)], limit_val_batches=0)
    assert steps(tmp_path) == {f"{name}.ckpt": step for name, step in there.items()}
    assert [path.stem for path in found(tmp_path / "checkpoints")] == list(there)


def test_at_every_moment_last_and_another_one_are_whole(tmp_path, monkeypatch):
    """Every change of the folder is looked at, so a crash after any of them is too."""
    seen = []
    folder = tmp_path / "checkpoints"

    def watched(name):
        original = getattr(os, name)

        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            seen.append([damage(path) for path in found(folder)])
            return result

        return call

    for name in ("link", "rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, watched(name))
    fit(tmp_path, [LastAndBest(every_n_steps=2, keep=3)], limit_val_batches=0)
    assert all(bad is None for moment in seen for bad in moment)
    counts = [len(moment) for moment in seen]
    assert counts[0] == 1
    first = counts.index(2)
    assert all(count >= 2 for count in counts[first:])
    assert max(counts) == 3


def test_a_run_that_goes_on_from_an_older_file_does_not_keep_the_damaged_one(tmp_path):
    fit(tmp_path, [LastAndBest(every_n_steps=2)], max_steps=6, limit_val_batches=0)
    folder = tmp_path / "checkpoints"
    (folder / "last.ckpt").write_bytes(b"rubbish")
    fit(tmp_path, [LastAndBest(every_n_steps=4)], checkpoint=folder / "previous.ckpt", max_steps=8, limit_val_batches=0)
    assert steps(tmp_path) == {"last.ckpt": 8, "previous.ckpt": 4}


def test_no_single_byte_can_change_unnoticed(tmp_path):
    """A changed byte is found, or it is one that torch.load does not read."""
    fit(tmp_path, [LastAndBest()], max_steps=2)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = bytearray(path.read_bytes())
    whole = load(tmp_path)
    missed = []
    places = torch.randperm(len(content), generator=torch.Generator().manual_seed(0))[:400].tolist()
    for place in [*places, *range(len(content) - 200, len(content))]:
        content[place] ^= 0x41
        path.write_bytes(content)
        if damage(path) is None:
            try:
                if not same(torch.load(path, weights_only=True), whole):
                    missed.append(place)
            except RuntimeError:
                pass  # refused by torch itself
        content[place] ^= 0x41
    assert missed == []
    path.write_bytes(content)
    assert damage(path) is None


@pytest.mark.parametrize("length", [0, 10, 0.5, 0.99, -1])
def test_a_truncated_file_is_damaged(tmp_path, length):
    path = tmp_path / "x.ckpt"
    torch.save({"weights": torch.randn(1000), "global_step": 3}, path)
    content = path.read_bytes()
    assert damage(path) is None
    path.write_bytes(content[: int(length * len(content)) if isinstance(length, float) else length])
    assert damage(path)


def test_the_order_in_which_files_are_tried(tmp_path):
    assert newest(tmp_path) == (None, [])
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("previous_10", "best", "previous_2", "previous", "last", "previous_notes"):
        torch.save({"global_step": 1}, folder / f"{name}.ckpt")
    assert [path.stem for path in found(folder)] == ["last", "previous", "previous_2", "previous_10", "best"]
    assert kept(folder, 3) == [folder / "last.ckpt", folder / "previous.ckpt", folder / "previous_2.ckpt"]
    for name in ("last", "previous"):
        (folder / f"{name}.ckpt").write_bytes(b"x" * 500)
    path, said = newest(tmp_path)
    assert path == folder / "previous_2.ckpt"
    assert len(said) == 2
    assert all("\n" not in line and "previous_2.ckpt" in line for line in said)


def test_a_run_goes_on_from_the_one_before_to_the_same_bits(words, said):  # noqa: F811
    words = [*words, "callbacks.checkpoint.every_n_steps=2", "trainer.max_steps=10", "model.dropout=0.1"]
    whole = trainkit.run(words).dir
    run = trainkit.run([*words, "trainer.max_steps=8", "schedule.total=10"]).dir
    last = run / "checkpoints" / "last.ckpt"
    content = last.read_bytes()
    for path in (last, run / "checkpoints" / "best.ckpt"):
        path.unlink()
        path.write_bytes(content[: len(content) // 2])
    trainkit.run([f"resume={run}", "trainer.max_steps=10"])
    (line,) = [line for line in said if "cannot be read" in line]
    assert "going on from previous.ckpt" in line
    assert losses(run) == losses(whole)
    a, b = (torch.load(d / "checkpoints" / "last.ckpt", weights_only=True) for d in (run, whole))
    assert same(a["state_dict"], b["state_dict"])
    assert same(a["optimizer_states"], b["optimizer_states"])


def test_nothing_sound_is_one_sentence(words):  # noqa: F811
    run = trainkit.run([*words, "callbacks.checkpoint.every_n_steps=3"]).dir
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.ckpt, previous\.ckpt, best\.ckpt are damaged") as caught:
        trainkit.run([f"resume={run}", "trainer.max_steps=10"])
    assert len(str(caught.value).splitlines()) == 2


def test_a_half_written_file_does_not_stand_in_the_way(tmp_path):
    fit(tmp_path, [LastAndBest()], max_steps=4)
    for name in ("last", "best", "previous"):
        (tmp_path / "checkpoints" / f"{name}.ckpt.part").write_bytes(b"half")
    fit(tmp_path, [LastAndBest()], checkpoint=tmp_path / "checkpoints" / "last.ckpt", task=Toy())
    assert steps(tmp_path).keys() == {"last.ckpt", "previous.ckpt", "best.ckpt"}


def test_keep_is_checked():
    with pytest.raises(ValueError, match=r"callbacks\.checkpoint\.keep must be at least 1"):
        LastAndBest(keep=0)
