"""Reservoir and ring against the algorithms one sample at a time, their chances, and their state."""

import io
import warnings

import pytest
import torch
from torch import Tensor

from trainkit.learner.buffer import Reservoir, Ring, seed_of
from trainkit.learner.learner import Stream

CHI2_999 = {19: 43.82, 5: 20.52}  # 99.9 % of chi-square with so many degrees of freedom


def stream(classes: int = 4, tasks: int = 2, **options) -> Stream:
    parts = torch.arange(classes).chunk(tasks)
    return Stream(tasks, classes, [part.tolist() for part in parts], lambda raw, _: raw, **options)


def samples(first: int, count: int, classes: int = 4, tasks: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Samples that carry their number, with labels in no order."""
    numbers = torch.arange(first, first + count)
    labels = numbers * 7 // 3 % classes
    return numbers.view(-1, 1, 1, 1), labels, labels * tasks // classes


def contents(buffer) -> list[int]:
    return buffer._stored["raw"].flatten().tolist()


class Naive:
    """The reservoir, a sample at a time, with the same random numbers."""

    def __init__(self, size: int, seed: int):
        self.kept, self.size, self.seen = [], size, 0
        self.generator = torch.Generator().manual_seed(seed_of(seed, 0))

    def add(self, number: int) -> None:
        if self.seen < self.size:
            self.kept.append(number)
        else:
            r = int(torch.randint(2**63 - 1, (1,), generator=self.generator)) % (self.seen + 1)
            if r < self.size:
                self.kept[r] = number
        self.seen += 1


@pytest.mark.parametrize("pieces", [[1] * 60, [7, 13, 40], [60], [3, 2, 55]])
def test_the_reservoir_in_batches_is_the_one_by_one(pieces):
    buffer, naive, done = Reservoir(5, stream(seed=3)), Naive(5, seed=3), 0
    for piece in pieces:
        buffer.add(*samples(done, piece))
        for number in range(done, done + piece):
            naive.add(number)
        done += piece
        assert contents(buffer)[: len(naive.kept)] == naive.kept
        raw, labels, task_ids, logits = buffer.draw(100)
        assert sorted(raw.flatten().tolist()) == sorted(naive.kept)
        numbers = raw.flatten()
        assert torch.equal(labels, numbers * 7 // 3 % 4)
        assert torch.equal(task_ids, labels // 2)
        assert logits is None
        naive.generator.set_state(buffer.generator.get_state())  # the draw has moved it
    assert buffer.seen == 60


def test_the_reservoir_keeps_everything_with_the_same_chance():
    counts, runs = torch.zeros(20), 3000
    for seed in range(runs):
        buffer = Reservoir(5, stream(seed=seed))
        for first in range(0, 20, 4):
            buffer.add(*samples(first, 4))
        counts[contents(buffer)] += 1
    expected = runs * 5 / 20
    # A sample of 5 of 20 without replacement has 15/19 of a multinomial's variance.
    assert ((counts - expected) ** 2 / expected).sum() * 19 / 15 < CHI2_999[19]


def test_draws_are_distinct_and_uniform():
    buffer, counts = Reservoir(6, stream()), torch.zeros(6)
    buffer.add(*samples(0, 6))
    for _ in range(3000):
        drawn = buffer.draw(2).raw.flatten()
        assert drawn[0] != drawn[1]
        counts[drawn] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() * 5 / 4 < CHI2_999[5]


@pytest.mark.parametrize("kind", [Reservoir, Ring])
def test_a_draw_has_as_many_as_asked_for_or_as_there_are(kind):
    buffer = kind(8, stream())
    assert len(buffer) == 0
    buffer.add(*samples(0, 3))
    assert len(buffer) == len(buffer.draw(10).labels) == 3
    buffer.add(*samples(3, 40))
    assert len(buffer) == len(buffer.draw(10).labels) == 8
    assert len(buffer.draw(2).labels) == 2


@pytest.mark.parametrize("pieces", [[1] * 40, [9, 20, 11], [40]])
def test_the_ring_keeps_the_last_of_each_class(pieces):
    buffer, done = Ring(10, stream()), 0  # shares of 2, 3, 2, 3
    shown: dict[int, list[int]] = {label: [] for label in range(4)}
    for piece in pieces:
        raw, labels, task_ids = samples(done, piece)
        buffer.add(raw, labels, task_ids)
        for number, label in zip(raw.flatten().tolist(), labels.tolist(), strict=True):
            shown[label].append(number)
        done += piece
        expected = {number for label, share in enumerate((2, 3, 2, 3)) for number in shown[label][-share:]}
        assert set(buffer.draw(100).raw.flatten().tolist()) == expected


def test_the_ring_keeps_each_tasks_own_where_tasks_share_classes():
    shared = Stream(2, 2, [[0, 1], [0, 1]], lambda raw, _: raw)
    buffer = Ring(4, shared)
    for task in range(2):
        numbers = torch.arange(10) + 10 * task
        buffer.add(numbers.view(-1, 1, 1, 1), numbers % 2, torch.full((10,), task))
    assert sorted(buffer.draw(9).raw.flatten().tolist()) == [8, 9, 18, 19]


@pytest.mark.parametrize("kind", [Reservoir, Ring])
@pytest.mark.parametrize("before", [0, 2, 30])
def test_a_restored_buffer_goes_on_identically(kind, before):
    def fill(buffer, first, count):
        buffer.add(*samples(first, count), torch.arange(first, first + count).double().view(-1, 1))

    one = kind(8, stream())
    if before:
        fill(one, 0, before)
        one.draw(3)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = kind(8, stream(seed=9))
    other.load_state_dict(torch.load(file, weights_only=True))
    for first in (30, 45):
        fill(one, first, 15)
        fill(other, first, 15)
        for a, b in zip(one.draw(5), other.draw(5), strict=True):
            assert a is not None
            assert torch.equal(a, b)


def test_a_state_is_not_changed_by_what_comes_later():
    buffer = Reservoir(4, stream())
    buffer.add(*samples(0, 4))
    state = buffer.state_dict()
    buffer.add(*samples(4, 100))
    assert state["stored"]["raw"].flatten().tolist() == [0, 1, 2, 3]


def test_ranks_share_the_places_and_draw_by_themselves():
    with pytest.warns(
        UserWarning, match=r"buffer_size=21 cannot be shared out among 2 processes: each keeps 10, 20 in"
    ):
        ranks = [Reservoir(21, stream(rank=rank, world=2)) for rank in range(2)]
    for buffer in ranks:
        buffer.add(*samples(0, 200))
        assert len(buffer) == 10
    assert contents(ranks[0]) != contents(ranks[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reservoir(20, stream(world=2))


def test_a_buffer_smaller_than_the_classes_warns_and_works():
    with pytest.warns(UserWarning, match=r"buffer_size leaves 3 places on each process, fewer than the 4 classes"):
        reservoir = Reservoir(3, stream())
    with pytest.warns(UserWarning, match=r"leaves 3 places .*, fewer than the 4 pairs of a task and a class"):
        ring = Ring(3, stream())
    for buffer in (reservoir, ring):
        buffer.add(*samples(0, 40))
        assert len(buffer) == 3
    assert len(set(ring.draw(3).labels.tolist())) == 3


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"at least 1 on each of the 2 processes; got 1"):
        Reservoir(1, stream(world=2))
    state = Reservoir(8, stream()).state_dict()
    with pytest.raises(ValueError, match=r"checkpoint's buffer is a Reservoir of 8 .* this run's a Reservoir of 9"):
        Reservoir(9, stream()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"this run's a Ring of 8"):
        Ring(8, stream()).load_state_dict(state)
    with pytest.raises(ValueError, match=r"among 4 pairs .* this run's among 6: keep data\.tasks"):
        Ring(8, stream(6)).load_state_dict(Ring(8, stream()).state_dict())
    with pytest.raises(ValueError, match="a label that its task has not"):
        Ring(8, stream()).add(torch.zeros(1, 1, 1, 1), torch.tensor([3]), torch.tensor([0]))
