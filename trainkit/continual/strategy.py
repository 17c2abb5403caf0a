"""The interface of continual-learning strategies; itself the strategy that changes nothing."""

from torch import Tensor, nn


class Strategy(nn.Module):
    """Nothing beyond plain training: what a strategy may do, at construction and at run time.

    A module, so that its buffers are saved and moved with the task that holds it. A leaf overrides what it needs.
    """

    def convert(self, model: nn.Module) -> nn.Module:
        """The model with this strategy's layers; called once, before optimizer, DDP and loading."""
        return model

    def begin_task(self, model: nn.Module, task: int) -> None:
        """Task number `task` of the stream starts."""

    def begin_batch(self, model: nn.Module, task_ids: Tensor) -> None:
        """A training forward follows; task_ids: (B,), the task of each of its samples."""

    def end_task(self, model: nn.Module, task: int) -> None:
        """Task number `task` of the stream has ended."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """What is added to the loss."""
        return 0.0
