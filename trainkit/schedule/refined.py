"""Refined schedule: what the gradient norms of an earlier run call for (Defazio et al. 2023, arXiv:2310.07831)."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from trainkit.schedule.warmup import Schedule

LOGGED = {"l1": "grad_norm/global_l1", "l2": "grad_norm/global"}  # the norm's name in metrics.jsonl
SGD_TYPE = ("SGD", "SGDP", "ASGD", "LARS")  # their steps are proportional to the gradient; the others are Adam's kind
WRAPPERS = ("SAM",)  # they step another optimizer, whose name is not theirs
FEWEST = 3  # from two norms comes a straight line, which is schedule=linear
SMALLEST = 1e-6  # of the largest norm; what is below counts as this


def refined(
    *, total: int, from_run: str, norm: Literal["auto", "l1", "l2"] = "auto", tau: float = 0.1, optimizer: str = ""
) -> Schedule:
    """factor_t ~ ω_t · Σ_{p>t} ω_p with ω_t = 1 / Ĝ_t² (norm=l2, for SGD) or 1 / Ĝ_t (norm=l1, for Adam-type methods).

    Ĝ: the norms of the whole gradient at the steps of the run in the directory `from_run`, smoothed by a median filter
    over a share `tau` of them. Large norms at the start become a warm-up, norms that grow at the end a faster decay,
    and norms that stay the same linear decay; their scale has no effect. The largest factor is 1 and the last 0.

    norm=auto takes l2 where `optimizer`, the dotted name of a class, is of SGD's kind, else l1. A run that logged
    every n-th step has its norms interpolated in between; trainer.log_every_n_steps=1 records them all. Where `total`
    differs from the length of that run, the schedule is interpolated over the fraction of training. Steps whose norm
    is not finite count as not logged. Zero norms, whose weight would be infinite, count as the smallest positive one.

    As in the authors' code the norms are those before clipping. It warms up only as far as the norms ask for it: make
    the first run with the schedule and the peak that you would have used anyway, then tune the peak again.
    """
    if norm == "auto":
        norm = norm_for(optimizer)
    factors = resample(refine(recorded(from_run, norm), norm=norm, tau=tau), total)
    return lambda step: factors[min(step, total - 1)]


def norm_for(optimizer: str) -> Literal["l1", "l2"]:
    """The norm that the theory has for an optimizer, named by its class."""
    name = optimizer.rpartition(".")[2]
    if not name or name in WRAPPERS:
        fact = f"{name} does not tell which optimizer it wraps" if name else "it is not given"
        raise ValueError(
            f"schedule.norm=auto goes by the optimizer's name; {fact}. Say schedule.norm=l2 for SGD, else l1"
        )
    return "l2" if name in SGD_TYPE else "l1"


# --- norms -> schedule --------------------------------------------------------------------------------------------


def refine(norms: Sequence[float], *, norm: Literal["l1", "l2"] = "l2", tau: float = 0.1) -> list[float]:
    """The schedule for a run as long as `norms`, one per step: its largest value is 1, its last 0."""
    filtered = median_filter(norms, tau)
    largest = max(filtered)
    if len(filtered) < 2 or largest <= 0:
        raise ValueError("a schedule is made from the norms of at least 2 steps, and they must not all be zero")
    rates = closed_form([value / largest for value in filtered], norm=norm)
    peak = max(rates)
    return [rate / peak for rate in rates]


def closed_form(norms: Sequence[float], *, norm: Literal["l1", "l2"] = "l2") -> list[float]:
    """η_t = ω_t · Σ_{p>t} ω_p / ω_{T-1}, before it is scaled; η_{T-1} = 0."""
    floor = max(min(value for value in norms if value > 0), SMALLEST * max(norms))
    clipped = (max(value, floor) for value in norms)
    weights = [1 / value**2 for value in clipped] if norm == "l2" else [1 / value for value in clipped]
    later = [*accumulate(reversed(weights[1:]))][::-1]
    return [weight * rest / weights[-1] for weight, rest in zip(weights, later, strict=False)] + [0.0]


def median_filter(values: Sequence[float], tau: float) -> list[float]:
    """Each value replaced by the median of the 2 · floor(floor(τ T) / 2) + 1 around it, T the number of values.

    To the left of the first value it is repeated, to the right of the last the values before it follow in reverse.
    (The authors reflect by more samples than the window reaches and repeat the last of those, to no effect.)
    """
    if not 0 <= tau <= 1:
        raise ValueError(f"schedule.tau is a share of the steps and must lie between 0 and 1; got {tau}")
    half = int(tau * len(values)) // 2
    padded = [*[values[0]] * half, *values, *values[-2 : -2 - half : -1]] if half else list(values)

    # The window as a set of ranks, a byte each. The median moves to a neighbouring rank at most, which a search in the
    # bytes finds: linear in T for a window of any width, where sorting every window would be quadratic.
    order = sorted(range(len(padded)), key=padded.__getitem__)
    ranks = [0] * len(padded)
    for rank, position in enumerate(order):
        ranks[position] = rank
    window = bytearray(len(padded))
    for rank in ranks[: 2 * half + 1]:
        window[rank] = 1
    middle = sorted(ranks[: 2 * half + 1])[half]
    medians = [padded[order[middle]]]
    for leaves, enters in zip(ranks, ranks[2 * half + 1 :], strict=False):
        window[leaves], window[enters] = 0, 1
        if leaves <= middle < enters:
            middle = window.find(1, middle + 1)
        elif enters < middle <= leaves:
            middle = window.rfind(1, 0, middle)
        medians.append(padded[order[middle]])
    return medians


def resample(factors: Sequence[float], total: int) -> list[float]:
    """The schedule over `total` steps, the first and the last kept, interpolated linearly; its largest value is 1."""
    last = len(factors) - 1
    if total == 1 or total == len(factors):
        return [1.0] if total == 1 else list(factors)
    stretched = []
    for step in range(total):
        whole, part = divmod(step * last, total - 1)
        left, right = factors[whole], factors[min(whole + 1, last)]
        stretched.append(left + (right - left) * part / (total - 1))
    peak = max(stretched)
    return [factor / peak for factor in stretched]


# --- run -> norms -------------------------------------------------------------------------------------------------


def recorded(run: str | Path, norm: Literal["l1", "l2"]) -> list[float]:
    """The norm of the gradient at every step of a run, from its metrics.jsonl; interpolated where it was not logged.

    Raises ValueError where there are no such norms, or too few.
    """
    path, name = Path(run).expanduser() / "metrics.jsonl", LOGGED[norm]
    if not path.is_file():
        raise ValueError(f"schedule.from_run={run} must be a run's directory: it has no metrics.jsonl")
    steps: list[int] = []
    norms: list[float] = []
    with path.open() as file:
        for line in file:
            row = _row(line) if name in line else {}
            value = float(row.get(name, math.nan))  # also "NaN" and "Infinity", as JSON has no such numbers
            if math.isfinite(value):
                steps.append(row["step"])
                norms.append(value)
    if not norms:
        raise ValueError(f"schedule.from_run={run}:\n{_absent(path, norm)}")
    if len(norms) < FEWEST or not any(norms):
        what = f"{len(norms)} steps with {name}" if any(norms) else f"{name} logged as zero at every step"
        raise ValueError(
            f"schedule.from_run={run}:\nthat run has {what}, and at least {FEWEST} steps with a gradient are needed. "
            "Record a longer run, or with trainer.log_every_n_steps=1"
        )
    return between(steps, norms)


def between(steps: Sequence[int], norms: Sequence[float]) -> list[float]:
    """The norm at every step from 1 to the last, linear between the logged ones; the first reaches back to step 1."""
    filled = []
    for step in range(1, steps[-1] + 1):
        right = bisect_left(steps, step)
        left = right if steps[right] == step or right == 0 else right - 1
        share = (step - steps[left]) / (steps[right] - steps[left]) if left < right else 0.0
        filled.append(norms[left] + (norms[right] - norms[left]) * share)
    return filled


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}  # a last line that was torn while being written
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else {}


def _absent(path: Path, norm: Literal["l1", "l2"]) -> str:
    other: Literal["l1", "l2"] = "l2" if norm == "l1" else "l1"
    name = LOGGED[norm]
    if f'"{LOGGED[other]}"' in path.read_text():
        return f"that run logged {LOGGED[other]} but not {name}. Record it again, or take schedule.norm={other}"
    return f"that run logged no {name}. Record one whose callbacks have grad_norm, as callbacks=default"
