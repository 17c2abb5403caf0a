"""Ghost batch normalization on a stream of tasks (Hoffer, Hubara & Soudry 2017, arXiv:1705.08741)."""

from __future__ import annotations

from torch import nn

from trainkit.continual.batch_norms import inherit, replace, settings
from trainkit.continual.strategy import Strategy
from trainkit.norm_layer.ghost_batch import GhostBatchNorm


class GhostBatchNormStrategy(Strategy):
    """Every BatchNorm becomes a GhostBatchNorm (trainkit/norm_layer/ghost_batch.py), with its weight, bias, running
    statistics, eps and momentum.

    ghost: samples in one, for batches that have at least two of them; smaller batches are BatchNorm's. The paper's 128
    is for batches of thousands; a replay step of 10 new and 10 old samples has use for 10 or 5.
    **A trap**: a joint forward has the batch in the order [current; replayed], so that ghosts of 10 are one of new
    samples and one of old ones, and what was meant to be mixed is normalized as learner.forward=separate does it. That
    can be what one wants to study; it is not a BatchNorm with more noise. Only a ghost that spans both parts mixes.
    Ghosts belong to their rank, so norm_layer.sync=mean is a ValueError.
    """

    def __init__(self, *, ghost: int = 128, chunks: int | None = None):
        super().__init__()
        for name, value in (("ghost", ghost), ("chunks", chunks)):
            if value is not None and value < 1:
                raise ValueError(f"continual.{name} must be at least 1; got {value}")
        self.ghost, self.chunks = ghost, chunks

    def convert(self, model: nn.Module) -> nn.Module:
        def ghostly(bn: nn.Module) -> GhostBatchNorm:
            given = settings(bn)
            if given.pop("sync") != "none":
                raise ValueError("continual=ghost_bn keeps statistics apart, in each rank; set norm_layer.sync=none")
            layer = GhostBatchNorm(bn.num_features, ghost=self.ghost, chunks=self.chunks, **given)  # type: ignore[arg-type]
            return inherit(layer, bn, "running_mean", "running_var", "num_batches_tracked")

        return replace(model, ghostly, key="continual=ghost_bn")
