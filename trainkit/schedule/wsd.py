"""Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395): constant, then a linear decay over the last part."""

from trainkit.schedule.warmup import Schedule, after_warmup, progress, steps


def wsd(*, total: int, warmup: float = 0.05, decay: float = 0.2, final: float = 0.0) -> Schedule:
    """factor = 1 until the decay begins, then 1 - (1 - final) · p, p reaching 1 at step `total`.

    MiniCPM itself decays exponentially; `final` is the factor reached at the end.
    """
    start = total - steps(decay, total, key="decay")
    return after_warmup(
        warmup, total, lambda step: 1 - (1 - final) * progress(step, start, total) if step > start else 1.0
    )
