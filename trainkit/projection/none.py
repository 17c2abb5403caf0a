"""No projection: weights stay where the optimizer put them."""

from torch import nn


class NoProjection:
    """model -> None, doing nothing."""

    def __call__(self, model: nn.Module) -> None:
        return None
