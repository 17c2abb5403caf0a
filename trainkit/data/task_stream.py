"""Streams of tasks: one data module, one pass of the trainer, and a position that follows from its step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from trainkit.data.digits import Digits
from trainkit.data.images import Images
from trainkit.data.loader import FixedLoader, Share
from trainkit.data.pixels import Pixels, Split, crop
from trainkit.data.tasks import Kind, View
from trainkit.learner.learner import Batch

AT_LEAST = 256  # images per forward of an evaluation: batches of streams are small
ORDER = 1  # sets the draws of an order apart from those of a task, which begin with (seed, task)


@dataclass(kw_only=True, eq=False, repr=False)
class Stream(LightningDataModule):
    """Batches of task after task (trainkit.learner.learner.Batch), made of the images of a source, divided by `kind`.

    A task lasts `epochs` passes over its training images (1: online), or `steps_per_task` optimizer steps, over as many
    passes as those take; then the next one begins. A pass's last images are left out where they do not fill a batch.
    `batch_size` counts images per optimizer step over all processes and accumulated batches. mixed=True shuffles all
    tasks together, for as many steps: the upper bound `learner=joint`. `augment` and `pad` as in the other image
    sources; validation is the union of what all tasks see of the validation images, and so is the test. `workers` are
    threads that draw ahead. image and classes are what facts() told when the run was started; null: not yet known.
    Raises ValueError where `kind` cannot make so many tasks, a task has fewer images than a batch, or the images are
    other ones than those that the run was started with. A leaf says what the source is.
    """

    kind: Kind
    tasks: int
    epochs: int = 1
    steps_per_task: int | None = None
    batch_size: int = 10
    seed: int = 0
    mixed: bool = False
    augment: Literal["none", "crop_flip"] = "none"
    pad: int = 4
    image: list[int] | None = None
    classes: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        super().__init__()
        self._views: dict[tuple[str, int], View] = {}
        counts = {"tasks": self.tasks, "epochs": self.epochs, "batch_size": self.batch_size}
        counts["steps_per_task"] = 1 if self.steps_per_task is None else self.steps_per_task
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"data.{name} must be at least 1; got {value}")
        if self.augment not in ("none", "crop_flip"):
            raise ValueError(f"data.augment is none or crop_flip; got {self.augment!r}")

    def origin(self) -> Pixels:
        """Where the images come from."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        if self._views:
            return
        self.source = self.origin()
        self.source.prepare_data()
        classes = int(self.source.splits["train"].labels.max()) + 1
        self.kind.check(self.tasks, classes)
        for part, split in self.source.splits.items():
            for task in range(self.tasks):
                view = self.kind.view(split, task, self.tasks, classes, self.seed)
                self._views[part, task] = view
                if part == "train" and len(view.items) < self.batch_size:
                    raise ValueError(
                        f"data.batch_size={self.batch_size} is more than the {len(view.items)} training images of task "
                        f"{task}; lower it, or data.tasks"
                    )
        self.mean = torch.from_numpy(self.source.mean).float()
        self.std = torch.from_numpy(self.source.std).float()

    def facts(self) -> dict[str, int | list[int]]:
        """What only reading the data tells: image, [channels, height, width], and classes."""
        return self.source.facts()

    def setup(self, stage: str) -> None:
        self.share()

    def share(self) -> Share:
        """This process's part of a step. Raises ValueError where batch_size cannot be shared out evenly."""
        return Share.of(self.trainer, self.batch_size, self.workers)

    # --- the tasks --------------------------------------------------------------------------------------------------

    def classes_of(self, task: int) -> list[int]:
        """The labels that occur in a task."""
        return self.kind.classes_of(task, self.tasks, self._classes())

    def ends(self) -> list[int]:
        """The optimizer step after which each task has ended, counted from 1 over the whole stream."""
        return list(accumulate(self.steps(task) for task in range(self.tasks)))

    def steps(self, task: int) -> int:
        """Optimizer steps that a task lasts."""
        return self.steps_per_task or self.epochs * (len(self._views["train", task].items) // self.batch_size)

    def task_at(self, step: int) -> int:
        """The task that optimizer step number `step`, from 0, belongs to; all of a mixed stream is the last one."""
        if self.mixed:
            return self.tasks - 1
        return min(int(np.searchsorted(self.ends(), step, side="right")), self.tasks - 1)

    def view(self, part: str, task: int) -> View:
        return self._views[part, task]

    def _classes(self) -> int:
        return int(self.source.splits["train"].labels.max()) + 1

    # --- batches ----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> StreamLoader:
        return StreamLoader(self, self.share(), trainer=self.trainer)

    def val_dataloader(self) -> FixedLoader:
        return self._all("val")

    def test_dataloader(self) -> FixedLoader:
        return self._all("test")

    def evaluation(self, task: int) -> FixedLoader:
        """What a task's accuracy is measured on."""
        return self._fixed(self.kind.part, [task])

    def training(self, task: int) -> FixedLoader:
        """A task's training images once, as they are."""
        return self._fixed("train", [task])

    def _all(self, part: str) -> FixedLoader:
        # Random labels contradict each other and say nothing about further images.
        return self._fixed(part, list(range(self.tasks))) if self.kind.part == "test" else self.training(self.tasks - 1)

    def _fixed(self, part: str, tasks: list[int]) -> FixedLoader:
        samples = self.samples(part, tasks)
        share = self.share()
        share = replace(share, micro_batch=max(share.micro_batch, AT_LEAST))
        return FixedLoader(np.arange(len(samples)), share, lambda items: self.batch(samples, items))

    def samples(self, part: str, tasks: list[int]) -> Samples:
        return Samples(self.source.splits[part], [self._views[part, task] for task in tasks], tasks)

    def batch(self, samples: Samples, items: np.ndarray) -> Batch:
        """These samples, standardized."""
        raw, labels, task_ids = samples.draw(items)
        images = torch.from_numpy(raw)
        return Batch(self.standardize(images), torch.from_numpy(labels), torch.from_numpy(task_ids), images)

    def standardize(self, raw: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32, per channel by the whole training set."""
        return (raw.float() / 255.0 - self.mean.to(raw.device)) / self.std.to(raw.device)

    def augmented(self, x: Tensor, shifts: np.ndarray, mirrored: Tensor) -> Tensor:
        """Standardized images moved by shifts (2, B), in 0 … 2 pad, and turned round where mirrored (B,)."""
        x = crop(x, self.pad, *shifts)
        return torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)

    def transform(self, raw: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 (B, C, H, W) -> what a training batch is made of, augmented anew."""
        x = self.standardize(raw)
        if self.augment == "none":
            return x
        shifts = torch.randint(2 * self.pad + 1, (2, len(x)), generator=generator).numpy()
        return self.augmented(x, shifts, torch.rand(len(x), generator=generator) < 0.5)


@dataclass(kw_only=True, eq=False, repr=False)
class DigitStream(Stream):
    """A stream made of scikit-learn's handwritten digits (trainkit.data.digits)."""

    def origin(self) -> Pixels:
        return Digits(image=self.image, classes=self.classes)


@dataclass(kw_only=True, eq=False, repr=False)
class ImageStream(Stream):
    """A stream made of a data set on the hub or in a local folder (trainkit.data.images)."""

    name: str
    field: str | None = None
    label: str | None = None
    size: int | None = None

    def origin(self) -> Pixels:
        source = Images(name=self.name, field=self.field, label=self.label, size=self.size)
        source.image, source.classes = self.image, self.classes
        return source


class Samples:
    """The samples of some tasks' views of a split, one after the other."""

    def __init__(self, split: Split, views: list[View], tasks: list[int]):
        self.split, self.views = split, views
        self.starts = np.cumsum([0, *(len(view.items) for view in views)])
        self.tasks = np.asarray(tasks, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def draw(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """raw images, labels and task ids at these positions."""
        owners = np.searchsorted(self.starts, items, side="right") - 1
        raw = np.empty((len(items), *self.split.images.shape[1:]), dtype=np.uint8)
        labels = np.empty(len(items), dtype=np.int64)
        for owner in np.unique(owners):
            mine, view = owners == owner, self.views[owner]
            places = items[mine] - self.starts[owner]
            raw[mine] = view.pixels(self.split.images[view.items[places]])
            labels[mine] = view.labels[places]
        return raw, labels, self.tasks[owners]


class StreamLoader:
    """The batches from the trainer's position to the end of the stream.

    Step s of pass e of task t takes the items [s · batch_size, (s + 1) · batch_size) of an order that follows from
    (seed, task, pass) alone, shared out as trainkit.data.loader.TrainLoader does; so a resumed run goes on with the
    batch that was next.
    """

    def __init__(self, stream: Stream, share: Share, *, trainer: Trainer | None = None):
        self.stream, self.share, self.trainer = stream, share, trainer
        self.source = stream.samples("train", list(range(stream.tasks)))
        self._saved: dict[str, Any] | None = None

    def __len__(self) -> int:
        return self.stream.ends()[-1] * self.share.accumulation

    def __iter__(self) -> Iterator[Batch]:
        here = self.state_dict()
        if self._saved not in (None, here):
            raise ValueError(
                "a resumed run must keep its stream (tasks, epochs, batch size, images, seed). "
                f"The checkpoint stands at {self._saved}, this run at {here}. Undo the change, or start a new run"
            )
        self._saved = None
        yield from self.share.drawn(self._draws())

    def _draws(self) -> Iterator[Callable[[], Batch]]:
        share, known, draw = self.share, (-1, -1), None
        ends = self.stream.ends()
        for step in range(self._done(), ends[-1]):
            task = self.stream.task_at(step)
            begun = 0 if self.stream.mixed or task == 0 else ends[task - 1]
            samples, size = self._samples(task), share.batch_size
            turn, place = divmod(step - begun, len(samples) // size)
            if draw is None or known != (task, turn):
                known, draw = (task, turn), self._pass(samples, task, turn)
            for micro in range(share.accumulation):
                first = place * size + (micro * share.world + share.rank) * share.micro_batch
                yield partial(draw, slice(first, first + share.micro_batch))

    def state_dict(self) -> dict[str, Any]:
        """The position, and what gives it its meaning."""
        stream = self.stream
        counts = [len(stream.view("train", task).items) for task in range(stream.tasks)]
        meaning = {"ends": stream.ends(), "images": counts, "batch_size": stream.batch_size, "seed": stream.seed}
        return {"step": self._done(), "kind": type(stream.kind).__name__, "mixed": stream.mixed, **meaning}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps where the checkpoint stands until the first batch is drawn: before, the trainer has no position."""
        self._saved = state

    def _done(self) -> int:
        return self.trainer.global_step if self.trainer else 0

    def _samples(self, task: int) -> Samples:
        return self.source if self.stream.mixed else self.stream.samples("train", [task])

    def _pass(self, samples: Samples, task: int, turn: int) -> Callable[[slice], Batch]:
        """What gives the batch at a stretch of one pass over a task."""
        stream, count = self.stream, len(samples)
        bits = np.random.PCG64(np.random.SeedSequence([ORDER, stream.seed, task, turn]))
        order = np.argsort(bits.random_raw(count), kind="stable")
        if stream.augment == "none":
            return lambda part: stream.batch(samples, order[part])
        # Drawn for the whole pass, so that an image's change does not depend on how the pass is shared out.
        shifts = (bits.random_raw((2, count)) % np.uint64(2 * stream.pad + 1)).astype(np.int64)
        mirrored = torch.from_numpy(bits.random_raw(count) % np.uint64(2) == 1)

        def draw(part: slice) -> Batch:
            batch = stream.batch(samples, order[part])
            return batch._replace(x=stream.augmented(batch.x, shifts[:, part], mirrored[part]))

        return draw
