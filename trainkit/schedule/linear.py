"""Linear decay, to zero unless told otherwise (the best choice when unsure: Defazio et al. 2023, arXiv:2310.07831)."""

from trainkit.schedule.warmup import Schedule, after_warmup, progress, steps


def linear(*, total: int, warmup: float = 0.05, final: float = 0.0) -> Schedule:
    """factor = 1 - (1 - final) · p, p from 0 at the end of the warm-up to 1 at step `total`."""
    start = steps(warmup, total, key="warmup")
    return after_warmup(warmup, total, lambda step: 1 - (1 - final) * progress(step, start, total))
