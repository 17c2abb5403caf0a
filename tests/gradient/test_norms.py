"""The lengths of gradients: found once per step, and anew as soon as anything has changed."""

import pytest
import torch

from trainkit.gradient.norms import norms
from trainkit.measure import shards


@pytest.fixture
def passes(monkeypatch):
    """How often gradients were really looked at."""
    seen, really = [], shards.norms
    monkeypatch.setattr(shards, "norms", lambda *args: seen.append(1) or really(*args))
    return seen


def gradients():
    return [torch.randn(3, 4, dtype=torch.float64), torch.randn(5)]


def right(found, tensors):
    wanted = torch.stack([g.double().square().sum().sqrt() for g in tensors])
    torch.testing.assert_close(found.double(), wanted)


def test_the_same_gradients_are_looked_at_once(passes):
    tensors = gradients()
    assert norms(tensors) is norms(list(tensors))
    assert len(passes) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda ts: ts[0].mul_(2),
        lambda ts: torch._foreach_mul_(ts, 3.0),
        lambda ts: ts[1][1:3].fill_(7),
        lambda ts: ts.__setitem__(1, torch.randn(5)),
        lambda ts: ts.append(torch.ones(2)),
        lambda ts: ts.pop(),
        lambda ts: ts.reverse(),
    ],
)
def test_whatever_changes_is_noticed(change, passes):
    tensors = gradients()
    norms(tensors)
    change(tensors)
    right(norms(tensors), tensors)
    assert len(passes) == 2


def test_gradients_of_the_next_step_are_others(passes):
    weight = torch.ones(3, requires_grad=True)
    for scale in (1.0, 2.0):
        weight.grad = None
        (scale * weight).sum().backward()
        right(norms([weight.grad]), [weight.grad])
    (weight * 5).sum().backward()  # accumulated
    right(norms([weight.grad]), [weight.grad])
    assert len(passes) == 3


def test_nothing_is_kept_alive():
    from weakref import ref

    tensors = gradients()
    norms(tensors)
    last = ref(tensors[0])
    del tensors
    assert last() is None
