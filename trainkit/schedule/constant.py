"""A constant learning rate after a warm-up."""

from trainkit.schedule.warmup import Schedule, after_warmup


def constant(*, total: int, warmup: float = 0.05) -> Schedule:
    """factor = 1 after the warm-up."""
    return after_warmup(warmup, total, lambda step: 1.0)
