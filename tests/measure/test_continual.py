"""Accuracy matrices against loops over their definitions."""

import math
import random
from statistics import mean

import pytest
import torch
from torch import Tensor

from trainkit.measure import continual

NAN = math.nan


def matrix(tasks: int, seed: int = 0, *, full: bool = False) -> list[list[float]]:
    """R as nested lists; full: tasks to come are measured as well."""
    draw = random.Random(seed)
    return [[draw.uniform(0, 100) if full or k <= t else NAN for k in range(tasks)] for t in range(tasks)]


def tensor(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("tasks", [2, 3, 5, 9])
@pytest.mark.parametrize("full", [False, True])
def test_each_number_is_its_definition(tasks, full):
    R = matrix(tasks, seed=tasks, full=full)
    last = R[-1]
    zero_shot = [R[t][t + 1] if full else 10.0 + t for t in range(tasks - 1)]
    untrained = [5.0 + k for k in range(tasks)]

    padded = [[R[t][k] for k in range(t + 1)] for t in range(tasks)]  # as mammoth builds its rows
    for t in range(tasks - 1):
        padded[t] += [zero_shot[t], *[0.0] * (tasks - t - 2)]
    mammoth = mean(max(row[k] for row in padded) - last[k] for k in range(tasks - 1))
    best = [max(R[t][k] for t in range(tasks - 1) if not math.isnan(R[t][k])) for k in range(tasks - 1)]
    first = [R[k][k] for k in range(tasks - 1)]
    expected = {
        "final_average_accuracy": mean(last),
        "average_anytime_accuracy": mean(mean(R[t][: t + 1]) for t in range(tasks)),
        "learning_accuracy": mean([*first, last[-1]]),
        "first_learned": R[0][0],
        "last_learned": R[tasks - 1][tasks - 1],
        "forgetting_avalanche": mean(a - b for a, b in zip(first, last, strict=False)),
        "forgetting_chaudhry": mean(a - b for a, b in zip(best, last, strict=False)),
        "bwt_mammoth": mean(b - a for a, b in zip(first, last, strict=False)),
        "bwt_avalanche": mean(b - a for a, b in zip(first, last, strict=False)),
    }
    for name, value in expected.items():
        assert float(getattr(continual, name)(tensor(R))) == pytest.approx(value, abs=1e-12), name
    assert float(continual.forgetting_mammoth(tensor(R), tensor(zero_shot))) == pytest.approx(mammoth, abs=1e-12)
    transfer = mean(zero_shot[k - 1] - untrained[k] for k in range(1, tasks))
    assert float(continual.fwt(tensor(R), tensor(untrained), tensor(zero_shot))) == pytest.approx(transfer, abs=1e-12)
    if full:  # zero-shot accuracies that R has itself
        assert float(continual.forgetting_mammoth(tensor(R))) == pytest.approx(mammoth, abs=1e-12)
        assert float(continual.fwt(tensor(R), tensor(untrained))) == pytest.approx(transfer, abs=1e-12)


def test_mammoths_forgetting_is_never_negative_and_the_others_may_be():
    better = tensor([[40.0, NAN, NAN], [60.0, 50.0, NAN], [90.0, 70.0, 80.0]])  # each task improves to the end
    assert float(continual.forgetting_mammoth(better)) == 0
    assert float(continual.forgetting_chaudhry(better)) == mean([60 - 90, 50 - 70])
    assert float(continual.forgetting_avalanche(better)) == mean([40 - 90, 50 - 70])
    # A zero-shot accuracy above all later ones counts as forgotten in mammoth's definition alone.
    assert float(continual.forgetting_mammoth(better, tensor([95.0, 0.0]))) == mean([0, 95 - 70])


def test_unmeasured_zero_shot_accuracies_count_nothing_in_mammoths_padding():
    R = tensor(matrix(4))
    assert continual.forgetting_mammoth(R) == continual.forgetting_mammoth(R, tensor([NAN, NAN, NAN]))
    assert continual.forgetting_mammoth(R) == continual.forgetting_mammoth(R, tensor([0.0, 0.0, 0.0]))


def test_what_was_not_measured_makes_no_number():
    R = tensor(matrix(3))
    assert continual.fwt(R, tensor([1.0, 2.0, 3.0])).isnan()  # R has no zero-shot accuracies
    R[1, 1] = NAN
    assert continual.bwt_mammoth(R).isnan()
    assert continual.forgetting_avalanche(R).isnan()
    assert not continual.final_average_accuracy(R).isnan()
    alone = tensor([[70.0]])
    assert continual.final_average_accuracy(alone) == continual.average_anytime_accuracy(alone) == 70
    for name in ("forgetting_mammoth", "forgetting_avalanche", "forgetting_chaudhry", "bwt_mammoth", "bwt_avalanche"):
        assert getattr(continual, name)(alone).isnan(), name
    never = tensor([[70.0, NAN], [60.0, NAN]])
    never[0, 0] = NAN
    assert continual.forgetting_chaudhry(never).isnan()  # no earlier row at all


def test_avalanche_pools_samples_where_mammoth_averages_tasks():
    R = tensor([[1.0, NAN], [1.0, 0.0]])
    assert float(continual.final_average_accuracy(R)) == 0.5
    assert float(continual.stream_accuracy_avalanche(R, torch.tensor([30, 10]))) == 0.75


def test_the_summary_has_what_is_defined():
    R = tensor(matrix(3, full=True))
    samples, untrained = torch.tensor([1, 2, 3]), tensor([1.0, 2.0, 3.0])
    found = continual.summary(R, untrained, samples)
    assert set(found) >= {"fwt", "forgetting_mammoth", "stream_accuracy_avalanche"}
    assert found["fwt"] == continual.fwt(R, untrained)
    assert "fwt" not in continual.summary(tensor(matrix(3)), untrained, samples)
    assert set(continual.summary(tensor([[70.0]]), tensor([1.0]), torch.tensor([5]))) == {
        "final_average_accuracy",
        "average_anytime_accuracy",
        "learning_accuracy",
        "first_learned",
        "last_learned",
        "stream_accuracy_avalanche",
    }


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="row per task"):
        continual.final_average_accuracy(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one value less"):
        continual.forgetting_mammoth(torch.zeros(3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="random accuracies"):
        continual.fwt(torch.zeros(3, 3), torch.zeros(2))
