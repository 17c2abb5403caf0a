"""Continual normalization on a stream of tasks (Pham, Liu & Hoi, ICLR 2022)."""

from __future__ import annotations

from torch import nn

from trainkit.continual.batch_norms import fitting, inherit, replace, settings
from trainkit.continual.strategy import Strategy
from trainkit.norm_layer.continual_norm import ContinualNorm


class ContinualNormStrategy(Strategy):
    """Every BatchNorm becomes a ContinualNorm (trainkit/norm_layer/continual_norm.py), with its weight, bias, running
    statistics, eps and momentum.

    groups: the paper's 32 for class-incremental learning. Where they do not divide a layer's width, the most that do:
    gcd(groups, width), so a network of width 20, 40, 80, 160 gets 4, 8, 16, 32, five channels in each. The running
    statistics of a BatchNorm that was trained before are of its input and must adapt to that of the group norm.
    """

    def __init__(self, *, groups: int = 32):
        super().__init__()
        if groups < 1:
            raise ValueError(f"continual.groups must be at least 1; got {groups}")
        self.groups = groups

    def convert(self, model: nn.Module) -> nn.Module:
        def continual(bn: nn.Module) -> ContinualNorm:
            width: int = bn.num_features  # type: ignore[assignment]
            layer = ContinualNorm(width, groups=fitting(self.groups, width), **settings(bn))
            return inherit(layer, bn, "running_mean", "running_var", "num_batches_tracked")

        return replace(model, continual, key="continual=cn")
