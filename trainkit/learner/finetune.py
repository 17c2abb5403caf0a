"""Plain training: the loss of the batch that comes in, nothing else."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Finetune:
    """loss = loss(model, batch). The lower baseline of continual learning and the whole of everyday training."""

    def __call__(
        self, model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and further 0-d tensors to log by name."""
        return loss(model, batch), {}
