"""Inverse square root decay (Vaswani et al. 2017, arXiv:1706.03762): falls by half whenever the step grows fourfold."""

from math import sqrt

from trainkit.schedule.warmup import Schedule, after_warmup, steps


def inverse_sqrt(*, total: int, warmup: float = 0.05, timescale: float | None = None) -> Schedule:
    """factor = 1 / sqrt(1 + (n - W) / timescale) at step n = W, W + 1, …, W being the length of the warm-up.

    timescale: the steps after which the factor has fallen to 1 / sqrt(2), in the units of `warmup`. None: W, and 1
    without a warm-up, which is the paper's sqrt(W / n). It does not depend on the length of the run unless lengths
    are given as fractions, and has not come to an end at `total`: a longer run continues a shorter one.
    """
    start = max(1, steps(warmup, total, key="warmup"))
    scale = start if timescale is None else steps(timescale, total, key="timescale")
    if scale < 1:
        raise ValueError(
            f"schedule.timescale must be at least one step; got {timescale}. Try null, the warm-up's length"
        )
    return after_warmup(warmup, total, lambda step: 1 / sqrt(1 + (step + 1 - start) / scale))
