"""What an accuracy matrix of a stream of tasks says: accuracy, forgetting and transfer, by whose definition.

Throughout, R is (T, T): R[t, k] is the accuracy on task k after training task t, NaN where it was not measured; tasks
are counted from 0. Any unit: shares in, shares out. What rests on a value that was not measured is NaN, and so is
forgetting or transfer in a stream of one task, where there is nothing to forget or transfer. Results are 0-d, in R's
dtype.

The names say whose definition it is, as they differ: mammoth's are those of utils/metrics.py in aimagelab/mammoth,
Avalanche's those of its evaluation/metrics/forgetting_bwt.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def final_average_accuracy(R: Tensor) -> Tensor:
    """mean_k R[T-1, k]: every task counts alike, however many samples it has."""
    return _square(R)[-1].mean()


def average_anytime_accuracy(R: Tensor) -> Tensor:
    """mean_t mean_{k<=t} R[t, k]: how good the network was on what it had seen, over the whole stream."""
    return torch.stack([row[: t + 1].mean() for t, row in enumerate(_square(R))]).mean()


def learning_accuracy(R: Tensor) -> Tensor:
    """mean_k R[k, k]: every task right after it was trained (Riemer et al. 2019, MER)."""
    return torch.diagonal(_square(R)).mean()


def first_learned(R: Tensor) -> Tensor:
    """R[0, 0]: beside last_learned, whether the network can still learn what it could at first."""
    return _square(R)[0, 0]


def last_learned(R: Tensor) -> Tensor:
    """R[T-1, T-1]."""
    return _square(R)[-1, -1]


def forgetting_mammoth(R: Tensor, zero_shot: Tensor | None = None) -> Tensor:
    """mean_{k<T-1} (max_t A[t, k] - R[T-1, k]), A = R[t, k] for k <= t, zero_shot[t] for k = t + 1, 0 beyond.

    zero_shot: (T-1,), the accuracy on task t+1 after task t, before task t+1 is trained; None: what R has there. As in
    mammoth the maximum runs over all rows, the last and those before the task was trained included, and what was not
    measured counts 0, so that it is never negative.
    """
    tasks = len(_square(R))
    before = torch.diagonal(R, 1) if zero_shot is None else _one_less(zero_shot, tasks)
    above = torch.ones_like(R, dtype=torch.bool).triu(1)
    padded = torch.where(above, torch.diag_embed(before.to(R).nan_to_num(), 1), R)
    return (padded.amax(0) - R[-1])[:-1].mean()


def forgetting_avalanche(R: Tensor) -> Tensor:
    """mean_{k<T-1} (R[k, k] - R[T-1, k]): against the first value, not the best. Negative where a task improved."""
    return -bwt_mammoth(R)


def forgetting_chaudhry(R: Tensor) -> Tensor:
    """mean_{k<T-1} (max_{t<T-1} R[t, k] - R[T-1, k]) over the measured rows (Chaudhry et al. 2018, RWalk).

    The usual definition: against the best value before the last task. Negative where the last task helped.
    """
    earlier = _square(R)[:-1, :-1]
    if not earlier.numel():
        return R.new_full((), torch.nan)
    best = torch.where(earlier.isnan(), -torch.inf, earlier).amax(0)
    return (torch.where(best.isinf(), torch.nan, best) - R[-1, :-1]).mean()


def bwt_mammoth(R: Tensor) -> Tensor:
    """Backward transfer, mean_{k<T-1} (R[T-1, k] - R[k, k]) (Lopez-Paz & Ranzato 2017, GEM)."""
    return (_square(R)[-1] - torch.diagonal(R))[:-1].mean()


def bwt_avalanche(R: Tensor) -> Tensor:
    """Backward transfer as Avalanche has it: - forgetting_avalanche, which is the same number as mammoth's."""
    return -forgetting_avalanche(R)


def fwt(R: Tensor, random: Tensor, zero_shot: Tensor | None = None) -> Tensor:
    """Forward transfer, mean_{k>=1} (R[k-1, k] - random[k]) (Lopez-Paz & Ranzato 2017; mammoth).

    random: (T,), the untrained network's accuracy on each task; zero_shot: (T-1,), R[k-1, k]; None: what R has there.
    """
    tasks = len(_square(R))
    if random.shape != (tasks,):
        raise ValueError(f"the random accuracies of {tasks} tasks are expected; got the shape {tuple(random.shape)}")
    before = torch.diagonal(R, 1) if zero_shot is None else _one_less(zero_shot, tasks)
    return (before - random[1:]).mean()


def stream_accuracy_avalanche(R: Tensor, samples: Tensor) -> Tensor:
    """sum_k n_k R[T-1, k] / sum_k n_k: all test samples pooled, as Avalanche does. samples: (T,), n_k of each task."""
    weights = samples.to(R)
    return (_square(R)[-1] * weights).sum() / weights.sum()


def summary(R: Tensor, random: Tensor, samples: Tensor) -> dict[str, Tensor]:
    """All of the above by name, as far as what was measured defines them."""
    found = {
        "final_average_accuracy": final_average_accuracy(R),
        "average_anytime_accuracy": average_anytime_accuracy(R),
        "learning_accuracy": learning_accuracy(R),
        "first_learned": first_learned(R),
        "last_learned": last_learned(R),
        "stream_accuracy_avalanche": stream_accuracy_avalanche(R, samples),
        "forgetting_mammoth": forgetting_mammoth(R),
        "forgetting_avalanche": forgetting_avalanche(R),
        "forgetting_chaudhry": forgetting_chaudhry(R),
        "bwt_mammoth": bwt_mammoth(R),
        "bwt_avalanche": bwt_avalanche(R),
        "fwt": fwt(R, random),
    }
    return {name: value for name, value in found.items() if not value.isnan()}


def _square(R: Tensor) -> Tensor:
    if R.dim() != 2 or R.shape[0] != R.shape[1] or not R.numel():
        raise ValueError(
            f"an accuracy matrix has a row per task trained and a column per task evaluated; got the shape "
            f"{tuple(R.shape)}. Cut it to the tasks trained so far, R[:t, :t]"
        )
    return R


def _one_less(zero_shot: Tensor, tasks: int) -> Tensor:
    if zero_shot.shape != (tasks - 1,):
        raise ValueError(
            f"zero_shot has one value less than there are tasks, {tasks - 1}; got the shape {tuple(zero_shot.shape)}"
        )
    return zero_shot
