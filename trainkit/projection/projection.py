"""What projections share that do more than look at the model: a beginning, a memory, the optimizer, a penalty."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.measure.shards import is_sharded


class Projection:
    """model -> None, in place: called once before training, then after every optimizer step.

    A leaf says what the first call does (`begin`, at the start of a run only, not where one is resumed) and what the
    others do (`project`). Whoever trains calls, in this order: `load_state_dict` where a run is resumed, `prepare`
    with the optimizer that the projection follows, the projection itself, then for every step `penalty`, which is
    added to the loss, and the projection; `state_dict` goes into the checkpoint. All of them may be left out by
    projections that are plain functions of the model.
    """

    def __init__(self) -> None:
        self.begun = False  # this run, possibly before it was resumed
        self.called = False  # this object
        self.optimizer: Optimizer | None = None

    def prepare(self, optimizer: Optimizer) -> None:
        """Keeps the optimizer, whose groups hold the learning rate and the weight decay of the step just taken."""
        self.optimizer = optimizer

    def __call__(self, model: nn.Module) -> None:
        if self.called:
            self.project(model)
        elif not self.begun:
            self.begin(model)
        # else resumed: the weights are as the last step and its projection left them
        self.begun = self.called = True

    def begin(self, model: nn.Module) -> None:
        """Before the first step of a run."""

    def project(self, model: nn.Module) -> None:
        """After every step."""
        raise NotImplementedError

    def refuse_shards(self, p: Tensor) -> None:
        """ValueError for a sharded parameter: what is done to a weight depends on all of it."""
        if is_sharded(p):
            raise ValueError(
                f"{self.word} needs whole weights, this one of shape {tuple(p.shape)} is sharded. "
                "Try trainer=ddp, or projection=none"
            )

    @property
    def word(self) -> str:
        """The choice on the command line, for messages."""
        return f"projection={type(self).__module__.rpartition('.')[-1]}"

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Added to the loss."""
        return 0.0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers that a resumed run needs."""
        return {"begun": self.begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun = state["begun"]
