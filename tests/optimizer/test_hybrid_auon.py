"""Hybrid-AuON against a plain loop, with Newton-Schulz by singular values."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from trainkit.optimizer.auon import AuON
from trainkit.optimizer.hybrid_auon import HybridAuON

SHAPES = [(6, 4), (4, 9), (6, 4), (5, 2, 3, 2), (7,)]


def parameters(dtype=torch.float64, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(ps: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def orthogonalized(u: Tensor, steps: int) -> Tensor:
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left @ torch.diag_embed(s) @ right


@pytest.mark.parametrize("conv", ["released", "flat"])
@pytest.mark.parametrize("steps", [1, 5])
def test_against_a_loop(conv, steps):
    lr, mu, decay, gamma = 0.1, 0.9, 0.2, 2.5
    ps = parameters()
    want, buffers = [p.detach().clone() for p in ps], [torch.zeros_like(p) for p in ps]
    made = HybridAuON(ps, lr, mu, decay, gamma=gamma, steps=steps, conv=conv)
    for seed in range(3):
        gradients(ps, seed)
        for i, p in enumerate(ps):
            buffers[i] = mu * buffers[i] + (1 - mu) * p.grad
            u = (1 - mu) * p.grad + mu * buffers[i]
            if u.ndim > 1:
                shape = u.shape
                u = orthogonalized(u.flatten(1) if conv == "flat" else u, steps).reshape(shape)
            brake = (gamma * u / (u.norm() + 1e-7)).cosh().square().mean().sqrt()
            want[i] = (1 - lr * decay) * want[i] - lr * u / (brake + 1e-8)
        made.step()
    for p, w in zip(ps, want, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-10)


def test_vectors_are_stepped_as_by_auon():
    (p,), (q,) = parameters(shapes=[(7,)]), parameters(shapes=[(7,)])
    one, other = HybridAuON([p]), AuON([q])
    for seed in range(2):
        gradients([p], seed)
        gradients([q], seed)
        one.step()
        other.step()
    assert torch.equal(p, q)


def test_dtype_of_the_iteration():
    ps, qs = parameters(shapes=[(12, 20)]), parameters(shapes=[(12, 20)])
    before = ps[0].detach().clone()
    for values, dtype in ((ps, "parameter"), (qs, "bfloat16")):
        gradients(values, 0)
        HybridAuON(values, dtype=dtype).step()
    error = (ps[0] - qs[0]).norm() / (ps[0] - before).norm()
    assert 1e-4 < error < 0.05


def test_zero_gradients_and_missing_ones():
    ps = parameters()
    before = [p.detach().clone() for p in ps]
    for p in ps[1:]:
        p.grad = torch.zeros_like(p)
    made = HybridAuON(ps)
    made.step()
    assert all(torch.equal(p, b) for p, b in zip(ps, before, strict=True))
    gradients(ps, 1)
    made.step()
    assert all(p.isfinite().all() and not torch.equal(p, b) for p, b in zip(ps, before, strict=True))


def test_half_precision_parameters_have_wide_momentum_and_are_rounded_once():
    ps = parameters(torch.bfloat16)
    qs = [nn.Parameter(p.detach().float()) for p in ps]
    gradients(ps, 0)
    for p, q in zip(ps, qs, strict=True):
        q.grad = p.grad.float()
    one, other = HybridAuON(ps, 1.0), HybridAuON(qs, 1.0)
    one.step()
    other.step()
    for p, q in zip(ps, qs, strict=True):
        assert one.state[p]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(p, q.bfloat16())


def test_state_comes_back():
    ps, qs = parameters(torch.float32), parameters(torch.float32)
    one, other = HybridAuON(ps), HybridAuON(qs)
    gradients(ps, 0)
    one.step()
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            q.copy_(p)
    other.load_state_dict(deepcopy(one.state_dict()))
    for made, values in ((one, ps), (other, qs)):
        gradients(values, 1)
        made.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"gamma": -1.0}, {"eps": 0.0}, {"steps": 0}, {"conv": "square"}, {"dtype": "half"}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}"):
        HybridAuON(parameters(), **wrong)
