"""Batch renormalization on a stream of tasks (Ioffe, NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from trainkit.continual.batch_norms import copy, inherit, replace, settings
from trainkit.continual.strategy import Strategy
from trainkit.norm_layer.batch_renorm import BatchRenorm


class BatchRenormStrategy(Strategy):
    """Every BatchNorm becomes a BatchRenorm (trainkit/norm_layer/batch_renorm.py), with its weight, bias and eps.

    Its running statistics go on, running_std = sqrt(running_var + eps). momentum=None: the replaced layer's. The paper
    has 0.01 and the ramps [5000, 40000] and [5000, 25000], for training 100000 steps; an online stream ends before such
    ramps begin, and would be trained by BatchNorm. So the ramps here are those divided by 100, and the momentum is
    BatchNorm's. Steps are counted over the whole stream, and the ramps are not begun again with a task.
    """

    def __init__(
        self,
        *,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_ramp: Sequence[int] = (50, 400),
        d_ramp: Sequence[int] = (50, 250),
        momentum: float | None = None,
    ):
        super().__init__()
        self.options = {"r_max": r_max, "d_max": d_max, "r_ramp": r_ramp, "d_ramp": d_ramp}
        self.momentum = momentum

    def convert(self, model: nn.Module) -> nn.Module:
        def renormalized(bn: nn.Module) -> BatchRenorm:
            given = settings(bn) | ({} if self.momentum is None else {"momentum": self.momentum})
            layer = inherit(BatchRenorm(bn.num_features, **given, **self.options), bn, "running_mean")  # type: ignore[arg-type]
            copy((bn.running_var + bn.eps).sqrt(), layer.running_std)  # type: ignore[operator]
            return layer

        return replace(model, renormalized, key="continual=batch_renorm")
