"""Group normalization on a stream of tasks (Wu & He, ECCV 2018, arXiv:1803.08494)."""

from __future__ import annotations

from torch import nn

from trainkit.continual.batch_norms import fitting, replace, settings
from trainkit.continual.strategy import Strategy
from trainkit.norm_layer.group import GroupNorm


class GroupNormStrategy(Strategy):
    """Every BatchNorm becomes a GroupNorm (trainkit/norm_layer/group.py), with its weight, bias and eps.

    No batch, no running statistics, no difference between training and evaluation: nothing for a new task to overwrite
    but weights. groups: where they do not divide a layer's width, the most of them that do, gcd(groups, width): a
    network of width 20, 40, 80, 160 gets 4, 8, 16, 32 of 32, five channels in each, and groups=1 is layer norm
    throughout. `print(model)` shows them.
    """

    def __init__(self, *, groups: int = 32):
        super().__init__()
        if groups < 1:
            raise ValueError(f"continual.groups must be at least 1; got {groups}")
        self.groups = groups

    def convert(self, model: nn.Module) -> nn.Module:
        def grouped(bn: nn.Module) -> GroupNorm:
            given, width = settings(bn), bn.num_features
            layer = GroupNorm(width, axis=given["axis"], groups=fitting(self.groups, width), eps=given["eps"])  # type: ignore[arg-type]
            layer.gain, layer.bias = bn.weight, bn.bias  # type: ignore[assignment]
            return layer.train(bn.training)

        return replace(model, grouped, key="continual=group")
