"""Elastic weight consolidation, online: parameters that mattered for finished tasks are held where they were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from trainkit.learner.learner import Batch
from trainkit.learner.regularizer import Forward, Regularizer, chosen, moved, to, wide
from trainkit.measure.modes import evaluating

FISHERS = ("weighted", "empirical")


class ElasticWeightConsolidation(Regularizer):
    """loss = CE + weight · Σ_j F_j (θ_j - θ*_j)²

        at a task's end   F <- gamma F + mean over its samples of  w g²,   g = ∂ log p(y|x) / ∂θ,   θ* <- θ

    F has the parameters' shapes and is never negative: how fast the network's answers change with θ_j. The squares are
    those of each sample's own gradient, not of a batch's mean. fisher="weighted": w = p(y|x), as mammoth's ewc_on does
    it, the term of the right class in the expectation over the network's own answers; "empirical": w = 1. p is over the
    classes that compete in the cross-entropy. One F and one θ* serve all tasks, which costs two copies of the
    parameters; gamma below 1 forgets.

    The network is in eval mode for it, where mammoth takes batches of one in train mode: the variance of one sample
    (and of one pixel, in the last layers) makes BatchNorm's answer degenerate, and would enter its running statistics.
    chunk: samples per vectorized backward (torch.func), which takes memory for as many copies of the parameters; 1: a
    backward each. Networks with layers that cannot be vectorized get the latter too, and a warning. In float32 or
    wider; under DDP the mean is over all ranks' samples.

    Kirkpatrick et al. 2017 (arXiv:1612.00796); one running F: Schwarz et al. 2018 (arXiv:1805.06370). weight=10,
    gamma=1 are mammoth's for Split CIFAR-10.
    only: an expression that the names of the penalized parameters contain, null for all of them.
    """

    name = "ewc"

    def __init__(
        self,
        *,
        weight: float = 10.0,
        gamma: float = 1.0,
        fisher: Literal["weighted", "empirical"] = "weighted",
        chunk: int = 8,
        only: str | None = None,
        classes: Literal["all", "seen", "new"] = "all",
    ):
        super().__init__(weight=weight, classes=classes)
        if fisher not in FISHERS:
            raise ValueError(f"learner.fisher must be one of {', '.join(FISHERS)}; got {fisher!r}")
        if not 0 <= gamma <= 1:
            raise ValueError(f"learner.gamma must be between 0 and 1; got {gamma}")
        if chunk < 1:
            raise ValueError(f"learner.chunk must be at least 1; got {chunk}")
        self.gamma, self.fisher, self.chunk, self.only = gamma, fisher, chunk, only
        self._vectorized = True
        self.importance: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def distance(self, model: nn.Module, forward: Forward) -> Tensor:
        return moved(model, self.anchor, self.importance)

    def remember(self, model: nn.Module, batches: Iterable[Batch], competing: Callable[[Tensor], Tensor]) -> None:
        parameters = chosen(model, self.only)
        sums = {name: torch.zeros_like(wide(p.detach())) for name, p in parameters.items()}
        count = 0
        with evaluating(model):
            for x, labels, task_ids in chunks(batches, self.chunk):
                # Announced as a batch of one, which is what each sample is below.
                self.strategy.begin_batch(model, task_ids[:1])
                gradients, log_p = self._of_samples(model, parameters, x, labels, competing)
                weights = log_p.exp() if self.fisher == "weighted" else torch.ones_like(log_p)
                for name, g in gradients.items():
                    sums[name] += (wide(g).square() * weights.view(-1, *[1] * (g.dim() - 1))).sum(0)
                count += len(x)
        count = self._over_ranks(sums, count)
        if not count:
            raise ValueError("learner=ewc needs the finished task's samples for its Fisher; the loader gave none")
        for name, parameter in parameters.items():
            new = sums[name] / count
            if name in self.importance:
                new += self.gamma * to(self.importance, name, new)
            self.importance[name] = new
            self.anchor[name] = wide(parameter.detach()).clone()

    def _of_samples(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        x: Tensor,
        labels: Tensor,
        competing: Callable[[Tensor], Tensor],
    ) -> tuple[dict[str, Tensor], Tensor]:
        """∂ log p(y|x) / ∂θ of each sample by name, (n, …), and log p(y|x), (n,), without gradient."""

        def log_p(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
            logits = wide(functional_call(model, values, (sample.unsqueeze(0),)))
            return -F.cross_entropy(competing(logits), label.unsqueeze(0))

        if self.chunk > 1 and self._vectorized:
            values = {name: p.detach() for name, p in parameters.items()}
            try:
                return vmap(grad_and_value(log_p), in_dims=(None, 0, 0))(values, x, labels)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._vectorized = False
                reason = str(error).strip().splitlines()[0]
                warnings.warn(
                    f"ewc takes one sample at a time, as the network cannot be vectorized: {reason}", stacklevel=2
                )
        each = []
        for sample, label in zip(x, labels, strict=True):
            with torch.enable_grad():
                value = log_p(dict(parameters), sample, label)
                found = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True)
            each.append((*found, value.detach()))
        *gradients, log_ps = (torch.stack(column) for column in zip(*each, strict=True))
        return dict(zip(parameters, gradients, strict=True)), log_ps

    def _over_ranks(self, sums: dict[str, Tensor], count: int) -> int:
        """Sums over all ranks, in place, and the number of samples."""
        if self.stream.world == 1:
            return count
        some = next(iter(sums.values()))
        message = torch.cat([some.new_tensor([count]), *(value.flatten() for value in sums.values())])
        distributed.all_reduce(message)
        parts = message[1:].split([value.numel() for value in sums.values()])
        for value, part in zip(sums.values(), parts, strict=True):
            value.copy_(part.view_as(value))
        return int(message[0])

    def memory(self) -> dict[str, Any]:
        return {"importance": dict(self.importance), "anchor": dict(self.anchor)}

    def load_memory(self, memory: dict[str, Any]) -> None:
        self.importance, self.anchor = dict(memory["importance"]), dict(memory["anchor"])


def chunks(batches: Iterable[Batch], size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x, labels and task ids of at most `size` samples at a time, all of one task."""
    for batch in batches:
        for task in batch.task_ids.unique():
            of_task = (batch.task_ids == task).nonzero().flatten()
            for part in of_task.split(size):
                yield batch.x[part], batch.labels[part], batch.task_ids[part]
