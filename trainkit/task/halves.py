"""The mean gradient of one half of a step's batch, for gradient treatments that compare it with the other's."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from trainkit.task.base import Task


class Halves:
    """Finds the first half among the micro-batches of a step (over all ranks), or, where a step has only one, among
    the ranks. With an odd number it is the smaller part. Costs one more sum over the ranks in the steps that ask.

    Raises ValueError where there is neither.
    """

    def __init__(self, task: Task):
        self.task = task
        self.wanted = False  # in the step in progress
        self.batches, self.ranks = task.trainer.accumulate_grad_batches, task.trainer.world_size
        if self.batches == 1 and self.ranks == 1:
            raise ValueError(
                f"{type(task.gradient).__name__} compares the gradients of two halves of the batch, and this run takes "
                "the batch in one piece. Try trainer.accumulate_grad_batches=2, or trainer=ddp"
            )
        self._half: list[Tensor] = []
        self._own: dict[int, Tensor] = {}  # this rank's own gradient, before it is averaged
        self._hooks: list[RemovableHandle] = []

    def before(self, place: int) -> None:
        """Before micro-batch number `place` of a step."""
        if not self.wanted:
            return
        parameters = list(self.task.model.parameters())
        if self.batches > 1 and place == self.batches // 2:
            # Each micro-batch's loss is divided by their number.
            scale = self.batches / place
            self._half = [torch.zeros_like(p) if p.grad is None else p.grad * scale for p in parameters]
        elif self.batches == 1:
            self._own = {}
            self._hooks = [p.register_hook(partial(self._note, i)) for i, p in enumerate(parameters) if p.requires_grad]

    def _note(self, i: int, gradient: Tensor) -> None:
        self._own[i] = self._own[i] + gradient if i in self._own else gradient.detach().clone()

    def take(self) -> tuple[list[Tensor], float]:
        """The first half's mean gradient for every parameter of the model, zeros where it has none, and its share of
        the batch."""
        parameters = list(self.task.model.parameters())
        if self.batches > 1:
            share, gradients = (self.batches // 2) / self.batches, self._half
        else:
            first = self.ranks // 2
            mine = self._own if self.task.trainer.global_rank < first else {}
            share, gradients = first / self.ranks, [mine.get(i, torch.zeros_like(p)) for i, p in enumerate(parameters)]
        for hook in self._hooks:
            hook.remove()
        self._half, self._own, self._hooks = [], {}, []
        with torch.no_grad():
            if self.ranks > 1:
                gradients = self._mean(gradients, 1.0 if self.batches > 1 else share)
            scaler = self.task.trainer.scaler
            if scaler is not None:
                scale = scaler.scale(torch.ones((), device=self.task.device))
                gradients = [gradient / scale for gradient in gradients]
        return gradients, share

    def _mean(self, gradients: list[Tensor], share: float) -> list[Tensor]:
        """Over a `share` of the ranks, the others' being zero; one transfer."""
        flat = torch.cat([gradient.flatten() for gradient in gradients]) / share
        flat = self.task.trainer.strategy.reduce(flat, reduce_op="mean")
        pieces = flat.split([gradient.numel() for gradient in gradients])
        return [piece.view_as(gradient) for piece, gradient in zip(pieces, gradients, strict=True)]
