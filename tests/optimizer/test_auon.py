"""AuON in both forms against a plain loop, and the bounds of its brake."""

import math
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from trainkit.optimizer import multi_tensor
from trainkit.optimizer.auon import AuON

SHAPES = [(6, 4), (4, 9), (6, 4), (5, 2, 3, 2), (7,), ()]


def parameters(dtype=torch.float64, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(ps: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def brake(x: Tensor) -> Tensor:
    return x.cosh().square().mean().sqrt()


@pytest.mark.parametrize("block", [1 << 16, 7])  # 7: every tensor in many pieces
@pytest.mark.parametrize("form", ["released", "paper"])
@pytest.mark.parametrize("maximize", [True, False])
def test_against_a_loop(form, maximize, block, monkeypatch):
    monkeypatch.setattr(multi_tensor, "BLOCK", block)
    lr, mu, decay, gamma = 0.1, 0.9, 0.2, 2.5
    ps = parameters()
    want, buffers = [p.detach().clone() for p in ps], [torch.zeros_like(p) for p in ps]
    made = AuON(ps, lr, mu, decay, gamma=gamma, form=form, maximize=maximize)
    for seed in range(3):
        gradients(ps, seed)
        for i, p in enumerate(ps):
            g = -p.grad if maximize else p.grad
            buffers[i] = mu * buffers[i] + (1 - mu) * g
            u = (1 - mu) * g + mu * buffers[i]
            unit = u / (u.norm() + 1e-7)
            step = u / (brake(gamma * unit) + 1e-8)
            if form == "paper":
                scale = max(1, p.shape[-2] / p.shape[-1]) ** 0.5 if p.ndim > 1 else 1
                step = scale * unit / (brake(gamma * unit) + 1e-8)
            want[i] = (1 - lr * decay) * want[i] - lr * step
        made.step()
    for p, w in zip(ps, want, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 1.5, 4.0])
def test_the_step_is_along_the_momentum_and_the_brake_bounded(gamma):
    ps = parameters()
    gradients(ps, 0)
    before = [p.detach().clone() for p in ps]
    AuON(ps, 1.0, 0.0, gamma=gamma).step()
    for p, start in zip(ps, before, strict=True):
        ratio = p.grad / (start - p.detach())
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))
        assert 1 - 1e-7 <= ratio.mean() <= math.cosh(gamma) + 1e-7


def test_the_paper_form_has_steps_of_one_length():
    ps = parameters()
    gradients(ps, 0)
    before = [p.detach().clone() for p in ps]
    AuON(ps, 0.1, form="paper", gamma=1.0).step()
    for p, start in zip(ps[:2], before, strict=False):
        length = 0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5
        assert length / math.cosh(1) <= (p - start).norm() <= length


def test_weights_that_lie_otherwise_in_memory(monkeypatch):
    monkeypatch.setattr(multi_tensor, "BLOCK", 7)
    (p, r) = parameters(shapes=[(5, 2, 3, 2), (6, 4)])
    q = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    s = nn.Parameter(r.detach().t().contiguous().t())
    assert not q.is_contiguous()
    assert not s.is_contiguous()
    one, other = AuON([p, r]), AuON([q, s])
    for seed in range(3):
        gradients([p, r], seed)
        q.grad, s.grad = (x.grad.clone() for x in (p, r))  # contiguous, unlike the weights
        one.step()
        other.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(r, s)


def test_zero_gradients_and_missing_ones():
    ps = parameters()
    before = [p.detach().clone() for p in ps]
    for p in ps[1:]:
        p.grad = torch.zeros_like(p)
    made = AuON(ps)
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
    one, other = AuON(ps, 1.0), AuON(qs, 1.0)
    one.step()
    other.step()
    for p, q in zip(ps, qs, strict=True):
        assert one.state[p]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(p, q.bfloat16())


def test_state_is_four_bytes_per_parameter_and_comes_back():
    ps, qs = parameters(torch.float32), parameters(torch.float32)
    one, other = AuON(ps), AuON(qs)
    gradients(ps, 0)
    one.step()
    tensors = [t for state in one.state.values() for t in state.values() if isinstance(t, Tensor)]
    assert sum(t.nbytes for t in tensors) == 4 * sum(p.numel() for p in ps)
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            q.copy_(p)
    other.load_state_dict(deepcopy(one.state_dict()))
    for made, values in ((one, ps), (other, qs)):
        gradients(values, 1)
        made.step()
    assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"gamma": -1.0}, {"eps": 0.0}, {"form": "v1"}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}"):
        AuON(parameters(), **wrong)
