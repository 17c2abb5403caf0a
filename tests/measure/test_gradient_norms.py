"""The lengths of gradients: found once per step, and anew as soon as anything has changed."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor

from trainkit.gradient.scale import scale_
from trainkit.measure import shards
from trainkit.measure.grad_norm import grad_norm
from trainkit.measure.gradient_norms import norms


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


def test_some_of_them_or_in_another_order_are_not_looked_at_again(passes):
    tensors = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2)]
    norms(tensors)
    for chosen in (tensors[::-1], tensors[1:], tensors[:1]):
        right(norms(chosen), chosen)
    assert len(passes) == 1


def test_the_log_and_the_treatment_share_one_look(passes):
    weights = [nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2))]
    weights[0].grad, weights[2].grad = torch.randn(3, 4), torch.randn(2)
    norms([weights[0].grad, weights[2].grad])
    found = grad_norm({"head": [weights[2], weights[1]], "embed": [weights[0]]})
    assert len(passes) == 1
    right(torch.stack([found["head"], found["embed"]]), [weights[2].grad, weights[0].grad])


@pytest.mark.parametrize(
    "change",
    [
        lambda ts: ts[0].mul_(2),
        lambda ts: torch._foreach_mul_(ts, 3.0),
        lambda ts: ts[1][1:3].fill_(7),
        lambda ts: ts.__setitem__(1, torch.randn(5)),
        lambda ts: ts.append(torch.ones(2)),
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


def test_what_is_written_to_a_share_is_noticed():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        g = distribute_tensor(torch.ones(4, 3), init_device_mesh("cpu", (1,)), [Replicate()])
        before = norms([g]).clone()
        scale_([g], torch.tensor(0.5))
        torch.testing.assert_close(norms([g]), 0.5 * before)
    finally:
        distributed.destroy_process_group()
