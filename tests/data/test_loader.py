"""Who gets which windows of a step; what a loader does without a trainer."""

import threading
import time
from functools import partial
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from trainkit.data.loader import AHEAD, FixedLoader, Share, TrainLoader
from trainkit.data.windows import Windows, gather

CONTEXT = 4


def flat(lists):
    return list(chain.from_iterable(lists))


def rig(world=1, rank=0, accumulation=1, step=0, **more):
    """What a loader reads of a trainer."""
    device = SimpleNamespace(root_device=torch.device("cpu"))
    known = {"global_step": step, "num_training_batches": float("inf"), "overfit_batches": 0, "strategy": device}
    known |= {"world_size": world, "global_rank": rank, "accumulate_grad_batches": accumulation}
    return SimpleNamespace(**known | more)


def train_loader(tokens, batch_size, trainer=None, seed=0):
    array = np.arange(tokens, dtype=np.uint16)
    return TrainLoader(Windows(array, CONTEXT), Share.of(trainer, batch_size), seed=seed, trainer=trainer)


def steps(tokens, batch_size, world, accumulation, step=0):
    """First tokens of the windows of every optimizer step, over all processes and accumulated batches."""
    taken = []
    for rank in range(world):
        trainer = rig(world, rank, accumulation, step)
        firsts = [inputs[:, 0].tolist() for inputs, _ in train_loader(tokens, batch_size, trainer)]
        assert {len(first) for first in firsts} <= {batch_size // world // accumulation}
        taken.append([flat(firsts[i : i + accumulation]) for i in range(0, len(firsts), accumulation)])
    return [flat(parts) for parts in zip(*taken, strict=True)]


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 2), (8, 1), (1, 8)])
def test_a_step_sees_the_same_windows_however_it_is_shared_out(world, accumulation):
    alone, shared = steps(400, 8, 1, 1), steps(400, 8, world, accumulation)
    assert len(alone) == (400 // CONTEXT - 1) // 8
    assert [sorted(step) for step in shared] == [sorted(step) for step in alone]
    everything = flat(alone)
    assert len(set(everything)) == len(everything)


def test_the_position_is_the_global_step():
    for step in range(40):
        epoch, within = divmod(step, 12)
        whole = steps(400, 8, 1, 2, step=12 * epoch)
        assert steps(400, 8, 1, 2, step=step) == whole[within:]


def test_epochs_differ_unless_the_trainer_overfits():
    def first(**more):
        return next(iter(train_loader(400, 8, rig(num_training_batches=2, **more))))[0].tolist()

    assert first(step=0) != first(step=2)
    assert first(step=0, overfit_batches=2) == first(step=2, overfit_batches=2)


def test_an_epoch_of_the_trainer_may_be_shorter():
    loader = train_loader(400, 8, rig(accumulation=2, step=7, num_training_batches=5))
    assert loader.state_dict() == {"epoch": 2, "step": 1, "steps_per_epoch": 3, "seed": 0}


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"seed": 1}, {"tokens": 500}])
def test_a_changed_run_cannot_be_resumed(change):
    settings = {"tokens": 400, "batch_size": 8, "trainer": rig(step=5)}
    state = train_loader(**settings).state_dict()
    loader = train_loader(**settings | change)
    loader.load_state_dict(state)
    with pytest.raises(ValueError, match="a resumed run must keep its data, seed"):
        next(iter(loader))
    same = train_loader(**settings)
    same.load_state_dict(state)
    assert len(list(same)) == len(same) - 5


def test_without_a_trainer_a_loader_gives_the_first_epoch():
    loader = train_loader(400, 8)
    batches = list(loader)
    assert len(batches) == len(loader) == 12
    assert [b[0].tolist() for b in batches] == [b[0].tolist() for b in loader]
    assert all(x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (8, CONTEXT) for x, y in batches)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 60))
def test_evaluation_shares_a_set_that_does_not_depend_on_the_sharing(world, accumulation, micro, windows):
    assume(windows >= world)
    starts, tokens = np.arange(windows) * CONTEXT, np.arange(windows * CONTEXT + 1, dtype=np.uint16)
    batches = []
    for rank in range(world):
        share = Share.of(rig(world, rank, accumulation), world * accumulation * micro)
        loader = FixedLoader(starts, share, lambda mine: gather(tokens, mine, CONTEXT))
        batches.append([inputs[:, 0].tolist() for inputs, _ in loader])
        assert len(loader) == len(batches[-1])
        assert max(map(len, batches[-1])) <= micro
    # Equal shapes on every process: strategies that wait for each other in a forward pass would hang otherwise.
    assert len({tuple(map(len, rows)) for rows in batches}) == 1
    seen = sorted(flat(flat(batches)))
    assert seen == starts[: windows // world * world].tolist()


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_a_batch_that_cannot_be_shared_out_is_refused_with_one_that_can(batch_size, world, accumulation):
    trainer = rig(world, 0, accumulation)
    if batch_size % (world * accumulation) == 0:
        assert Share.of(trainer, batch_size).micro_batch * world * accumulation == batch_size
        return
    with pytest.raises(ValueError) as error:
        Share.of(trainer, batch_size)
    expected = f"data.batch_size={batch_size} must be a multiple of {world} processes x trainer.accumulate_grad_batches"
    assert str(error.value).startswith(f"{expected}={accumulation}; try ")
    assert int(str(error.value).split()[-1]) % (world * accumulation) == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_neither_the_order_nor_the_numbers(workers):
    def draws():
        return (partial(lambda i: (torch.full((2,), i), torch.tensor(i)), i) for i in range(50))

    alone = list(Share(2).drawn(draws()))
    assert [int(label) for _, label in alone] == list(range(50))
    for (x, y), (other, label) in zip(alone, Share(2, workers=workers).drawn(draws()), strict=True):
        assert torch.equal(x, other)
        assert torch.equal(y, label)


def test_workers_draw_ahead_and_end_with_the_pass():
    drawn = []

    def draw(i):
        drawn.append(i)
        return (torch.tensor(i),)

    batches = Share(1, workers=2).drawn(partial(draw, i) for i in range(1000))
    next(batches)
    deadline = time.monotonic() + 10
    while len(drawn) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 3 <= len(drawn) <= 1 + AHEAD * 2
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_a_gpu_are_page_locked_by_threads_that_use_it(monkeypatch, workers):
    """Both calls need a GPU, and are replaced."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: chosen.append((threading.current_thread().name, gpu)))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1000)
    trainer = rig(strategy=SimpleNamespace(root_device=torch.device("cuda", 3)))
    batches = Share.of(trainer, 2, workers).drawn(partial(lambda i: (torch.tensor(i),), i) for i in range(20))
    assert [int(batch[0]) for batch in batches] == list(range(1000, 1020))
    assert {gpu for _, gpu in chosen} == ({torch.device("cuda", 3)} if workers else set())
    assert all(name.startswith("data") for name, _ in chosen)  # the main thread is Lightning's to set
    assert Share.of(rig(), 2, workers).pin is None


def test_a_workers_error_reaches_the_run():
    def fail():
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Share(1, workers=2).drawn([fail]))
    with pytest.raises(ValueError, match=r"data\.workers must not be negative"):
        Share.of(None, 8, workers=-1)
