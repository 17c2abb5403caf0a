"""Cosine decay (Loshchilov & Hutter 2017, arXiv:1608.03983), without restarts."""

from math import cos, pi

from trainkit.schedule.warmup import Schedule, after_warmup, progress, steps


def cosine(*, total: int, warmup: float = 0.05, final: float = 0.1) -> Schedule:
    """factor = final + (1 - final) · (1 + cos(pi p)) / 2, p from 0 at the end of the warm-up to 1 at step `total`."""
    start = steps(warmup, total, key="warmup")
    return after_warmup(
        warmup, total, lambda step: final + (1 - final) * (1 + cos(pi * progress(step, start, total))) / 2
    )
