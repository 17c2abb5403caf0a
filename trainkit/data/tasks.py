"""How labelled images become a stream of tasks: by their classes, by changed pixels, or by redrawn labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn import functional as F

from trainkit.data.pixels import Split

ROUND = 42  # what mammoth adds to the seed of its class orders


def same(images: np.ndarray) -> np.ndarray:
    return images


@dataclass(frozen=True)
class View:
    """What a task sees of a split: the positions of its images there, their labels, and what becomes of the pixels.

    items, labels: int64 (N,); pixels: uint8 (B, C, H, W) -> the same.
    """

    items: np.ndarray
    labels: np.ndarray
    pixels: Callable[[np.ndarray], np.ndarray] = field(default=same)


class Kind:
    """What makes the tasks differ. Everything follows from (seed, task), so nothing of it needs to be saved."""

    part = "test"  # the split that accuracies are measured on

    def check(self, tasks: int, classes: int) -> None:
        """ValueError where these classes cannot make so many tasks."""

    def classes_of(self, task: int, tasks: int, classes: int) -> list[int]:
        """The labels that occur in a task."""
        return list(range(classes))

    def view(self, split: Split, task: int, tasks: int, classes: int, seed: int) -> View:
        """The task's part of a split."""
        raise NotImplementedError


class ByClass(Kind):
    """Each task has classes of its own, equally many: class- and task-incremental learning.

    seed 0 leaves the classes in their order; any other maps class c to default_rng(42 + seed).permutation(classes)[c],
    as mammoth and the code of AdaB2N do, and the tasks are then made of neighbours.
    """

    def check(self, tasks: int, classes: int) -> None:
        if tasks > classes:
            raise ValueError(f"data.tasks={tasks} is more than the {classes} classes there are")
        if classes % tasks:
            fits = [n for n in range(1, classes + 1) if classes % n == 0]
            raise ValueError(
                f"data.tasks={tasks} does not divide the {classes} classes; try one of {', '.join(map(str, fits))}"
            )

    def classes_of(self, task: int, tasks: int, classes: int) -> list[int]:
        each = classes // tasks
        return list(range(task * each, (task + 1) * each))

    def view(self, split: Split, task: int, tasks: int, classes: int, seed: int) -> View:
        order = np.arange(classes) if seed == 0 else np.random.default_rng(ROUND + seed).permutation(classes)
        labels = order[split.labels]
        items = np.flatnonzero(labels // (classes // tasks) == task)
        return View(items, labels[items])


class Permuted(Kind):
    """All classes in every task; the pixels of task t in an order of its own, the first one's as they are."""

    def view(self, split: Split, task: int, tasks: int, classes: int, seed: int) -> View:
        places = split.images[0, 0].size
        order = np.random.default_rng([seed, task]).permutation(places) if task else np.arange(places)

        def pixels(images: np.ndarray) -> np.ndarray:
            flat = images.reshape(*images.shape[:2], -1)
            return np.ascontiguousarray(flat[..., order]).reshape(images.shape)

        return View(np.arange(len(split.labels)), split.labels, pixels)


class Rotated(Kind):
    """All classes in every task; the images of task t turned by an angle drawn from [0, `degrees`), the first by 0.

    Bilinear, about the centre; what comes from outside is 0.
    """

    def __init__(self, degrees: float = 180.0):
        if not 0 < degrees <= 360:
            raise ValueError(f"data.kind.degrees must lie in (0, 360]; got {degrees}")
        self.degrees = degrees

    def view(self, split: Split, task: int, tasks: int, classes: int, seed: int) -> View:
        angle = np.deg2rad(np.random.default_rng([seed, task]).uniform(0, self.degrees)) if task else 0.0
        turn = torch.tensor([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]])

        def pixels(images: np.ndarray) -> np.ndarray:
            values = torch.from_numpy(images).double()
            grid = F.affine_grid(turn.expand(len(values), 2, 3), list(values.shape), align_corners=False)
            turned = F.grid_sample(values, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            return turned.round().clamp(0, 255).to(torch.uint8).numpy()

        return View(np.arange(len(split.labels)), split.labels, pixels if task else same)


class RandomLabels(Kind):
    """The same training images in every task, their labels drawn anew, uniformly and regardless of the image.

    A network that keeps its plasticity learns the last task as fast as the first (Lyle et al. 2024, arXiv:2407.01800).
    There is nothing to generalize, so accuracies are those on the training images.
    """

    part = "train"

    def view(self, split: Split, task: int, tasks: int, classes: int, seed: int) -> View:
        labels = np.random.default_rng([seed, task]).integers(0, classes, len(split.labels))
        return View(np.arange(len(split.labels)), labels)


class ShuffledLabels(Kind):
    """All images in every task, the numbers of their classes permuted anew: the milder plasticity benchmark."""

    def view(self, split: Split, task: int, tasks: int, classes: int, seed: int) -> View:
        order = np.random.default_rng([seed, task]).permutation(classes)
        return View(np.arange(len(split.labels)), order[split.labels])
