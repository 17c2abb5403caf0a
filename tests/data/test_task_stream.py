"""Streams: what each task holds, batches that follow from the position alone, and what cannot be a stream."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from trainkit.data.task_stream import DigitStream, StreamLoader
from trainkit.data.tasks import ByClass, Permuted, RandomLabels, Rotated, ShuffledLabels


def stream(kind=None, **options):
    made = DigitStream(kind=kind or ByClass(), **{"tasks": 5, **options})
    made.prepare_data()
    return made


def at(made, step, *, world=1, rank=0, accumulation=1):
    """The batches from a trainer's step on."""
    trainer = SimpleNamespace(
        global_step=step,
        world_size=world,
        global_rank=rank,
        accumulate_grad_batches=accumulation,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    made.trainer = trainer
    return list(StreamLoader(made, made.share(), trainer=trainer))  # type: ignore[arg-type]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_each_task_has_its_classes_once():
    made = stream()
    batches = at(made, 0)
    assert len(batches) == made.ends()[-1] == sum(made.steps(t) for t in range(5))
    for step, batch in enumerate(batches):
        task = made.task_at(step)
        assert (batch.task_ids == task).all()
        assert set(batch.labels.tolist()) <= {2 * task, 2 * task + 1}
    images = torch.cat([batch.raw for batch in batches]).flatten(1)
    assert len(images) == 10 * len(batches)
    # One pass: nothing comes twice, but for images that are equal in the data themselves.
    everything = torch.from_numpy(made.source.splits["train"].images).flatten(1)
    repeated = len(everything) - len(everything.unique(dim=0))
    assert len(images) - len(images.unique(dim=0)) <= repeated


def test_the_class_order_follows_the_seed_as_in_mammoth():
    made = stream(seed=3)
    order = np.random.default_rng(45).permutation(10)
    labels = made.source.splits["train"].labels
    view = made.view("train", 2)
    assert set(order[labels[view.items]]) == {4, 5} == set(view.labels)
    np.testing.assert_array_equal(view.labels, order[labels[view.items]])


@pytest.mark.parametrize(
    "options", [{}, {"epochs": 2}, {"steps_per_task": 37, "augment": "crop_flip"}, {"mixed": True}]
)
def test_a_resumed_run_sees_the_batches_that_were_next(options):
    made = stream(**options)
    everything = at(made, 0)
    for step in (1, made.ends()[0], made.ends()[2] + 3):
        rest = at(made, step)
        assert len(rest) == len(everything) - step
        assert all(same(a, b) for a, b in zip(rest, everything[step:], strict=True))


def test_two_ranks_and_two_accumulated_batches_share_a_step():
    made = stream(batch_size=12, augment="crop_flip")
    whole = at(made, 0)[:3]
    ranks = [at(made, 0, world=2, rank=rank, accumulation=2) for rank in (0, 1)]
    for step in range(3):
        parts = [ranks[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)]
        for name in ("x", "labels", "task_ids", "raw"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole[step], name))


def test_mixed_holds_all_tasks_from_the_start():
    batches = at(stream(mixed=True), 0)
    assert set(torch.cat([b.task_ids for b in batches[:10]]).tolist()) == set(range(5))


def test_a_transformed_image_is_what_a_batch_is_made_of():
    made = stream(augment="crop_flip", pad=1)
    batch = at(made, 0)[0]
    plain = made.standardize(batch.raw)
    again = made.transform(batch.raw, torch.Generator().manual_seed(0))
    assert again.shape == batch.x.shape == plain.shape
    assert again.dtype == torch.float32
    assert not torch.equal(again, plain)
    assert not torch.equal(again, batch.x)
    assert torch.equal(stream().transform(batch.raw, torch.Generator()), plain)


def test_permuted_keeps_the_pixels_and_rotated_turns_them():
    permuted, rotated = stream(Permuted()), stream(Rotated(degrees=180))
    images = permuted.source.splits["train"].images[:4]
    moved = permuted.view("train", 3).pixels(images)
    assert not (moved == images).all()
    np.testing.assert_array_equal(np.sort(moved.reshape(4, -1)), np.sort(images.reshape(4, -1)))
    for made in (permuted, rotated):
        np.testing.assert_array_equal(made.view("train", 0).pixels(images), images)
    # An image is the same in every set that it is drawn with, and a quarter turn of a symmetric one is itself.
    turned = rotated.view("train", 2).pixels
    np.testing.assert_array_equal(turned(images)[1:2], turned(images[1:2]))
    flat = np.full((1, 1, 8, 8), 200, dtype=np.uint8)
    assert turned(flat)[0, 0, 3:5, 3:5].min() == 200


def test_random_labels_are_drawn_anew_and_shuffled_ones_keep_the_classes():
    random, shuffled = stream(RandomLabels(), tasks=3), stream(ShuffledLabels(), tasks=3)
    first, second = (random.view("train", task).labels for task in (0, 1))
    assert 0.05 < (first == second).mean() < 0.15
    true = shuffled.source.splits["train"].labels
    new = shuffled.view("train", 1).labels
    pairs = set(zip(true.tolist(), new.tolist(), strict=True))
    assert len(pairs) == 10
    assert not (true == new).all()
    assert random.kind.part == "train"
    assert len(list(random.val_dataloader())) > 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tasks": 11}, "more than the 10 classes"),
        ({"tasks": 3}, "does not divide the 10 classes; try one of 1, 2, 5, 10"),
        ({"tasks": 0}, "data.tasks must be at least 1"),
        ({"batch_size": 600}, "more than the"),
        ({"augment": "mixup"}, "none or crop_flip"),
    ],
)
def test_what_is_no_stream(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        stream(**options)


def test_another_stream_cannot_be_resumed():
    made = stream()
    at(made, 0)
    loader = StreamLoader(made, made.share(), trainer=made.trainer)
    loader.load_state_dict({"step": 0, "ends": [1, 2], "seed": 0})
    with pytest.raises(ValueError, match="must keep its stream"):
        next(iter(loader))
