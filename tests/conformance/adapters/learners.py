"""Learners on a stream of tasks: one step, its replayed samples given."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainkit.continual.strategy import Strategy
from trainkit.learner.buffer import Items
from trainkit.learner.learner import Batch, Stream

from ..registry import File, Pairs, adapter, build


class Given:
    """A buffer that takes nothing in, and whose draws are those of the file."""

    def __init__(self, *draws: Items):
        self.draws: Iterator[Items] = iter(draws)
        self.generator = None

    def __len__(self) -> int:
        return 1

    def draw(self, count: int) -> Items:
        return next(self.draws)

    def add(self, *values: Tensor) -> None:
        pass


def items(file: File, prefix: str, *further: str) -> Items:
    labels = file[f"{prefix}_label"]
    return Items(file[f"{prefix}_x"], labels, torch.zeros_like(labels), *(file[f"{prefix}_{name}"] for name in further))


def stream(file: File) -> Stream:
    """The classes as one task: which labels came earlier the file says itself."""
    classes = list(range(file.hyperparameters["num_classes"]))
    return Stream(1, len(classes), [classes], lambda raw, _: raw)


def observe(learner, file: File, *draws: Items) -> Pairs:
    weight = file["param/weight"]
    model = nn.Linear(weight.shape[1], weight.shape[0])
    model.load_state_dict({name: file[f"param/{name}"] for name in ("weight", "bias")})
    learner.buffer = Given(*draws)
    labels = file["label"]
    x = file["x"]
    total, _ = learner(model, Batch(x, labels, torch.zeros_like(labels), x), None)
    total.backward()
    yield "expect/loss", total
    for name, parameter in model.named_parameters():
        yield f"expect/gparam/{name}", parameter.grad


@adapter("er_ace")
def er_ace(file: File) -> Pairs:
    learner = build("learner", "er_ace")
    learner.begin(stream(file), Strategy())
    learner.begin_task(nn.Identity(), file.hyperparameters["task"])
    learner.see(file["seen_before"])
    return observe(learner, file, items(file, "buf"))


@adapter("derpp")
def derpp(file: File) -> Pairs:
    hyper = file.hyperparameters
    learner = build("learner", "derpp", {"alpha": hyper["alpha"], "beta": hyper["beta"]})
    learner.begin(stream(file), Strategy())
    learner.begin_task(nn.Identity(), hyper["task"])
    # A term without weight makes no draw.
    drawn = [name for name, weight in (("buf1", hyper["alpha"]), ("buf2", hyper["beta"])) if weight]
    return observe(learner, file, *(items(file, name, "logits") for name in drawn))
