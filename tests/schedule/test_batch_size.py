"""The learning rate against the batch size: the two rules, and the words that apply them."""

from functools import partial

import pytest
from torch import nn
from torch.optim import SGD, AdamW

from trainkit.optimizer.partition import by_role, scale_lr
from trainkit.schedule.batch_size import lr_factor


def test_four_times_the_batch():
    assert lr_factor("sqrt", 128, 32) == pytest.approx(2.0)
    assert lr_factor("linear", 128, 32) == pytest.approx(4.0)
    assert lr_factor("none", 128, 32) == lr_factor("sqrt", 32, 32) == lr_factor("linear", 32, 32) == 1.0


@pytest.mark.parametrize(
    ("rule", "batch", "reference", "says"),
    [("cube", 4, 8, "is none, sqrt, linear; got 'cube'"), ("sqrt", 4, 0, "at least 1; got 0")],
)
def test_a_mistake_is_named(rule, batch, reference, says):
    with pytest.raises(ValueError, match=says):
        lr_factor(rule, batch, reference)
    with pytest.raises(ValueError, match=says):
        by_role(nn.Linear(2, 2), partial(SGD, lr=0.1), lr_batch_rule=rule, reference_batch=reference)


def test_every_group_of_every_child_is_scaled():
    rest = partial(AdamW, lr=1e-3)
    words = {"takes": ["matrix"], "rest": rest, "lr_batch_rule": "sqrt", "reference_batch": 8}
    made = by_role(nn.Linear(2, 2), partial(SGD, lr=0.1), **words)
    scale_lr(made, 32)
    assert [group["lr"] for group in made.param_groups] == pytest.approx([0.2, 2e-3])


def test_without_a_rule_nothing_is_scaled():
    made = by_role(nn.Linear(2, 2), partial(SGD, lr=0.1))
    scale_lr(made, 32)
    assert {group["lr"] for group in made.param_groups} == {0.1}
