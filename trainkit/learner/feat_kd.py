"""Feature distillation: on the new data, the features before the last layer stay those of the old network."""

from typing import Literal

from torch import Tensor, nn

from trainkit.learner.regularizer import Forward, Regularizer, wide


class FeatureDistillation(Regularizer):
    """loss = CE(over new classes) + weight · mean_i ‖h(x_i) - h*(x_i)‖²

    h: (B, width), what the last layer (of the role "head") is given; h*: the same in the network after the last task,
    frozen, with its own running statistics in eval mode. Holds the whole representation, so it also holds back what the
    new task would change in it.
    Smith et al. 2022 (arXiv:2203.17269). No official code was found, so the weight is ours, not theirs.
    """

    name = "feat_kd"
    wants = frozenset({"features"})

    def __init__(self, *, weight: float = 0.1, classes: Literal["all", "seen", "new"] = "new"):
        super().__init__(weight=weight, classes=classes)

    def distance(self, model: nn.Module, forward: Forward) -> Tensor:
        new, old = forward.features, forward.old_features
        assert new is not None
        assert old is not None
        return (wide(new) - wide(old)).flatten(1).square().sum(1).mean()
