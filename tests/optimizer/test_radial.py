"""Which weights are projected: told early on a CPU, by masks on an accelerator."""

import pytest
import torch

from tests.optimizer import toy
from trainkit.optimizer import radial
from trainkit.optimizer.adamp import AdamP
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
    early, told = radial.divide, {"projected": 0, "plain": 0}

    def watched(seen):
        projected, plain = early(seen)
        told["projected"] += len(projected)
        told["plain"] += len(plain)
        return projected, plain

    ours, theirs = toy.parameters(), toy.parameters()
    for params, divide in ((ours, watched), (theirs, lambda seen: (list(range(len(seen))), []))):
        monkeypatch.setattr(radial, "divide", divide)
        toy.take(make(params), params, steps=5)
    assert all(told.values()), told
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)
