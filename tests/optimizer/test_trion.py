"""Trion against its formula, Newton-Schulz written out; only what was used decays."""

import math

import pytest
import torch
from torch import nn

from trainkit.optimizer.dct import dct
from trainkit.optimizer.trion import Trion

F64 = torch.float64


def newton_schulz(x, steps=5):
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def reference(w, gradients, *, lr, momentum, weight_decay, rank, scale):
    tall, m = w.shape[0] >= w.shape[1], torch.zeros_like(w)
    q = dct(min(w.shape), torch.device("cpu"), F64)
    for g in gradients:
        b = m + g
        s = b @ q if tall else q @ b
        chosen = s.abs().sum(0 if tall else 1).argsort(descending=True)[:rank]
        if tall:
            low, c = s[:, chosen], q[:, chosen]
            m, update = b - (1 - momentum) * low @ c.T, newton_schulz(low) @ c.T
        else:
            low, c = s[chosen], q[chosen]
            m, update = b - (1 - momentum) * c.T @ low, c.T @ newton_schulz(low)
        w = w * (1 - lr * weight_decay) - lr * scale(*w.shape) * update
    return w, m


SCALES = {
    "spectral": lambda m, n: math.sqrt(max(1, m / n)),
    "match_rms_adamw": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "ratio": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
@pytest.mark.parametrize("scale", SCALES)
def test_formula(shape, scale):
    torch.manual_seed(0)
    w = nn.Parameter(torch.randn(shape, dtype=F64))
    gradients = [torch.randn(shape, dtype=F64) for _ in range(6)]
    knobs = {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.3, "rank": 3}
    expected, buffer = reference(w.detach(), gradients, **knobs, scale=SCALES[scale])
    optimizer = Trion([w], **knobs, scale=scale)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(optimizer.state[w]["momentum_buffer"], buffer, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_only_what_was_used_decays(shape):
    torch.manual_seed(0)
    w = nn.Parameter(torch.zeros(shape, dtype=F64))
    optimizer = Trion([w], momentum=0.0, rank=2)
    w.grad = torch.randn(shape, dtype=F64)
    optimizer.step()
    kept = optimizer.state[w]["momentum_buffer"]
    overlap = kept @ w.detach().T if shape[0] > shape[1] else kept.T @ w.detach()  # the update spans what was chosen
    assert overlap.abs().max() < 1e-10
    assert kept.norm() > 0.1


def test_the_update_is_nearly_orthogonal_and_keeps_its_size():
    torch.manual_seed(0)
    values = []
    for size in (1.0, 1e3):
        torch.manual_seed(0)
        w = nn.Parameter(torch.zeros(32, 12, dtype=F64))
        optimizer = Trion([w], lr=1.0, rank=4, scale="none")
        w.grad = size * torch.randn(32, 12, dtype=F64)
        optimizer.step()
        values.append(w.detach())
    singular = torch.linalg.svdvals(values[0])
    assert ((singular[:4] > 0.65) & (singular[:4] < 1.25)).all()
    assert singular[4:].max() < 1e-10
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-7)


def test_five_triples_of_coefficients():
    triples = [[3.4445, -4.7750, 2.0315]] * 5
    reached = []
    for coefficients in (triples, triples[0]):
        torch.manual_seed(0)
        w = nn.Parameter(torch.zeros(8, 4, dtype=F64))
        optimizer = Trion([w], rank=2, coefficients=coefficients)
        w.grad = torch.randn(8, 4, dtype=F64)
        optimizer.step()
        reached.append(w.detach())
    assert torch.equal(*reached)
