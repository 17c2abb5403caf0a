"""The numbers that claims are about, each of one arm and seed: (arm, seed, first arm, **settings) -> number, or NaN."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trainkit.report.collect import Run

LOSS = "val/loss"


@dataclass(frozen=True)
class Arm:
    """One method's runs by (value of the grid, seed), and its best value of the grid."""

    name: str
    runs: dict[tuple[str, int], Run]
    best: str

    def at(self, seed: int) -> Run | None:
        return self.runs.get((self.best, seed))

    def finished(self, seed: int) -> Run | None:
        """The run at the best value, if it reached its end: what a diverged one logged last says nothing."""
        run = self.at(seed)
        return run if run is not None and run.status == "finished" else None


def loss(run: Run | None) -> float:
    """The final validation loss; infinite for a run that did not reach its end, or whose loss is no number."""
    if run is None or run.status != "finished":
        return math.inf
    value = run.metrics.get(LOSS, math.nan)
    return value if math.isfinite(value) else math.inf


def metric(arm: Arm, seed: int, first: Arm, *, of: str) -> float:
    """A final metric, or the last logged value of a series."""
    run = arm.finished(seed)
    if run is None:
        return math.nan
    return run.metrics.get(of, _last(run, of))


def state(arm: Arm, seed: int, first: Arm) -> float:
    """Bytes of optimizer state per parameter."""
    run = arm.finished(seed)
    count = run.result.get("parameters") if run else None
    return run.result.get("optimizer_state_bytes", math.nan) / count if run and count else math.nan


def seconds(arm: Arm, seed: int, first: Arm) -> float:
    """Time of the run."""
    run = arm.finished(seed)
    return math.nan if run is None or run.seconds is None else run.seconds


def growth(arm: Arm, seed: int, first: Arm, *, of: str) -> float:
    """The last logged value of a series divided by its first."""
    run = arm.finished(seed)
    values = run.series[of].values if run and of in run.series else np.array([])
    return float(values[-1] / values[0]) if len(values) and values[0] else math.nan


def over_depth(arm: Arm, seed: int, first: Arm, *, of: str, at: str = "last") -> float:
    """The last block's value divided by the first block's; of: what is logged as <of>/blocks.<n>."""
    values = _profile(arm.at(seed) if at == "first" else arm.finished(seed), of, at)
    return float(values[-1] / values[0]) if len(values) > 1 and values[0] else math.nan


def unevenness(arm: Arm, seed: int, first: Arm, *, of: str, at: str = "last") -> float:
    """The standard deviation over blocks divided by their mean: 0 where all are alike."""
    values = _profile(arm.at(seed) if at == "first" else arm.finished(seed), of, at)
    return float(values.std() / values.mean()) if len(values) > 1 and values.mean() else math.nan


def share_of_top(arm: Arm, seed: int, first: Arm, *, of: str, at: str = "last") -> float:
    """The upper half's share of the sum of squares over blocks: 0.5 where all are alike."""
    squares = _profile(arm.at(seed) if at == "first" else arm.finished(seed), of, at) ** 2
    return float(squares[len(squares) // 2 :].sum() / squares.sum()) if len(squares) > 1 else math.nan


def late_blocks(arm: Arm, seed: int, first: Arm, *, of: str, share: float = 0.25) -> float:
    """The mean over the last `share` of the blocks."""
    values = _profile(arm.finished(seed), of, "last")
    return float(values[-max(1, round(share * len(values))) :].mean()) if len(values) else math.nan


def spread(arm: Arm, seed: int, first: Arm, *, cap: float) -> float:
    """How far the validation loss lies above its best over the grid on average, of one seed; losses end at `cap`.

    As measure/lr_sensitivity.py, but for the cap, which there is the loss at initialization.
    """
    losses = [min(loss(run), cap) for (_, number), run in arm.runs.items() if number == seed]
    return sum(losses) / len(losses) - min(losses) if losses else math.nan


def failures(arm: Arm, seed: int, first: Arm, *, above: float) -> float:
    """The share of the grid's runs that ended above this validation loss, or not at all."""
    losses = [loss(run) for (_, number), run in arm.runs.items() if number == seed]
    return sum(value > above for value in losses) / len(losses) if losses else math.nan


def steps_to(arm: Arm, seed: int, first: Arm) -> float:
    """The share of the steps after which the first arm's final validation loss is reached; 2 where it is not."""
    run, reference = arm.finished(seed), loss(first.at(seed))
    if run is None or LOSS not in run.series or not math.isfinite(reference):
        return math.nan
    series = run.series[LOSS]
    reached = series.steps[series.values <= reference]
    return float(reached[0] / series.steps[-1]) if len(reached) else 2.0


MEASURES: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        metric,
        state,
        seconds,
        growth,
        over_depth,
        unevenness,
        share_of_top,
        late_blocks,
        spread,
        failures,
        steps_to,
    )
}


def _last(run: Run, name: str) -> float:
    return float(run.series[name].values[-1]) if name in run.series else math.nan


def _profile(run: Run | None, of: str, at: str) -> np.ndarray:
    """The blocks' values in their order, at the first or last step that has them."""
    pattern = re.compile(re.escape(of) + r"/blocks\.(\d+)$")
    found = {
        int(match[1]): series for name, series in (run.series if run else {}).items() if (match := pattern.match(name))
    }
    return np.array([found[number].values[0 if at == "first" else -1] for number in sorted(found)])
