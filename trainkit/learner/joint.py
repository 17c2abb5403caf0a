"""Joint training: all tasks' data at once, the upper bound of continual learning."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainkit.learner.learner import Batch, Learner


class Joint(Learner):
    """loss = loss(model, batch), on a stream that shuffles all tasks together (data.mixed=true).

    Nothing is kept, so nothing is forgotten: what is left of a method's distance to it is forgetting, the rest is the
    network and its schedule.
    """

    mixes = True

    def begin_task(self, model: nn.Module, task: int) -> None:
        """ValueError where a task that others follow starts by itself."""
        if task < self.stream.tasks - 1:
            raise ValueError(
                "learner=joint trains on all tasks at once, but the stream brings them one after the other. "
                "Try data.mixed=true, or learner=finetune"
            )

    def __call__(
        self, model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(model, batch), {}
