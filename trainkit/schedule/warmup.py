"""What the schedules share: a linear warm-up, and lengths given in steps or as a fraction."""

from collections.abc import Callable

Schedule = Callable[[int], float]  # optimizer steps done -> factor on the learning rate


def steps(length: float, total: int, *, key: str) -> int:
    """A length below 1 is a fraction of total, else a number of steps."""
    if not 0 <= length <= total:
        raise ValueError(f"schedule.{key} must lie between 0 and the run's {total} steps; got {length}")
    return round(length * total) if length < 1 else int(length)


def after_warmup(warmup: float, total: int, rest: Schedule) -> Schedule:
    """factor(s) = (s + 1) / W for the first W steps, so that no step is lost to a factor of 0; then rest(s)."""
    warmup_steps = steps(warmup, total, key="warmup")
    return lambda step: (step + 1) / warmup_steps if step < warmup_steps else rest(step)


def progress(step: int, start: int, end: int) -> float:
    """0 at `start`, 1 from `end` on."""
    return min(1.0, (step - start) / max(1, end - start))
