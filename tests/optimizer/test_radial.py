"""Which weights are projected: told early on a CPU, by masks on an accelerator."""

import pytest
import torch
from torch import nn

from tests.optimizer import toy
from trainkit.optimizer import radial
from trainkit.optimizer.adamp import AdamP
from trainkit.optimizer.multi_tensor import Bucket
from trainkit.optimizer.sgdp import SGDP


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: AdamP(ps, lr=0.01, weight_decay=0.1, delta=1.0, nesterov=True),
        lambda ps: SGDP(ps, lr=0.1, momentum=0.9, weight_decay=0.1, delta=1.0),
        lambda ps: SGDP(ps, lr=0.1, momentum=0.9, weight_decay=0.1, delta=1.0, nesterov=True),
    ],
)
def test_the_early_decision_and_the_masks_agree(make, monkeypatch):
    early, told = radial.candidates, []

    def watched(found):
        told.extend(early(found))
        return early(found)

    ours, theirs = toy.parameters(), toy.parameters()
    for params, candidates in ((ours, watched), (theirs, lambda found: [True] * len(found))):
        monkeypatch.setattr(radial, "candidates", candidates)
        toy.take(make(params), params, steps=5)
    assert set(told) == {True, False}
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


def test_weights_are_only_read_to_decide():
    """In half precision, and where a weight lies otherwise than its gradient."""
    half = nn.Parameter(torch.randn(4, 6).bfloat16())
    other = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    for p in (half, other):
        p.grad = torch.randn(p.shape, dtype=p.dtype)
        versions = p._version, p.grad._version
        radial.align(Bucket([p], [p.grad], [{}], 1), delta=0.1, eps=1e-8)
        assert (p._version, p.grad._version) == versions
