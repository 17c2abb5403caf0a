"""Where a NaN comes from is named, and nothing is left behind."""

import math

import pytest
import torch
from torch import nn

from trainkit.measure.origin import first_non_finite_output, non_finite
from trainkit.norm_layer.batch import BatchNorm


class Poison(nn.Module):
    def __init__(self, value=math.nan):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x * self.value


class Inner(nn.Module):
    """Spoils its output itself, after the modules inside it have finished."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(3, 3)

    def forward(self, x):
        return self.up(x).sum() / 0


@pytest.mark.parametrize(
    ("broken", "named"),
    [(Poison(), "1"), (Poison(math.inf), "1"), (nn.Sequential(nn.ReLU(), Poison()), "1.1"), (Inner(), "1")],
)
def test_the_innermost_first_one_is_named(broken, named):
    model = nn.Sequential(nn.Linear(3, 3), broken, nn.Identity(), Poison())
    assert first_non_finite_output(model, lambda: model(torch.randn(2, 3))) == named


def test_a_healthy_model_has_no_such_output():
    model = nn.Sequential(nn.Linear(3, 3))
    assert first_non_finite_output(model, lambda: model(torch.randn(2, 3)) * math.nan) is None


def test_statistics_and_hooks_are_as_before():
    model = nn.Sequential(BatchNorm(3), Poison())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert before
    assert first_non_finite_output(model, lambda: model(torch.randn(4, 3) + 5)) == "1"
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_in_the_pass_is_not_swallowed():
    model = nn.Linear(3, 3)
    with pytest.raises(RuntimeError):
        first_non_finite_output(model, lambda: model(torch.randn(2, 4)))
    assert not model._forward_hooks


def test_values_are_found_wherever_they_are():
    assert non_finite((torch.zeros(2), {"a": [torch.tensor([1.0, math.nan])]}))
    assert non_finite(torch.tensor(math.inf))
    assert not non_finite((torch.zeros(2), torch.tensor(3), "nan", None))
