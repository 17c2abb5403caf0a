"""Muon against a plain loop over parameters, and against torch.optim.Muon."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from trainkit.optimizer.muon import Muon

SHAPES = [(6, 4), (4, 9), (6, 4), (5, 2, 3, 2), (3, 4, 5)]


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def gradients(ps: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return [p.grad for p in ps if p.grad is not None]


def polynomial_of_singular_values(u: Tensor, steps: int = 5) -> Tensor:
    left, s, right = torch.linalg.svd(u, full_matrices=False)
    s = s / (s.norm(dim=-1, keepdim=True) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return left @ torch.diag_embed(s) @ right


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("conv_scale", ["released", "flat"])
@pytest.mark.parametrize("maximize", [True, False])
def test_against_a_loop(nesterov, conv_scale, maximize):
    lr, mu, decay = 0.05, 0.9, 0.1
    ps = parameters()
    want, buffers = [p.detach().clone() for p in ps], [torch.zeros_like(p) for p in ps]
    made = Muon(ps, lr, mu, decay, nesterov=nesterov, conv_scale=conv_scale, maximize=maximize)
    for seed in range(3):
        gs = [g.clone() for g in gradients(ps, seed)]
        made.step()
        for i, (w, g) in enumerate(zip(want, gs, strict=True)):
            assert torch.equal(ps[i].grad, g)  # the gradient is not overwritten
            g = -g if maximize else g
            buffers[i] = mu * buffers[i] + (1 - mu) * g
            u = (1 - mu) * g + mu * buffers[i] if nesterov else buffers[i]
            flat = u.reshape(len(u), -1) if u.ndim == 4 else u
            m, n = flat.shape[-2:] if conv_scale == "flat" else u.shape[-2:]
            o = polynomial_of_singular_values(flat).reshape(u.shape)
            want[i] = (1 - lr * decay) * w - lr * max(1, m / n) ** 0.5 * o
        for p, w in zip(ps, want, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", ["spectral", "match_rms_adamw"])
def test_it_is_torchs_but_for_the_rounding(scale):
    """torch.optim.Muon orthogonalizes in bfloat16."""
    ps, qs = parameters(torch.float32)[:3], parameters(torch.float32)[:3]
    ours = Muon(ps, 0.01, weight_decay=0.1, normalize="clamp", scale=scale, dtype="bfloat16")
    theirs = torch.optim.Muon(qs, lr=0.01, adjust_lr_fn={"spectral": "original"}.get(scale, scale))
    before = [p.detach().clone() for p in ps]
    for seed in range(3):
        gradients(ps, seed)
        gradients(qs, seed)
        ours.step()
        theirs.step()
    for p, q, start in zip(ps, qs, before, strict=True):
        assert (p - q).norm() < 0.1 * (q - start).norm()


def test_updates_have_the_rms_of_adamws():
    p = nn.Parameter(torch.zeros(64, 256, dtype=torch.float64))
    made = Muon([p], lr=0.5, scale="match_rms_adamw")
    gradients([p], 0)
    made.step()
    assert p.square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.2)


def test_the_size_of_the_gradient_does_not_matter():
    ps, qs = parameters(), parameters()
    one, other = Muon(ps, eps=1e-30), Muon(qs, eps=1e-30)
    for seed in range(2):
        gradients(ps, seed)
        for q, g in zip(qs, gradients(qs, seed), strict=True):
            q.grad = 1e-5 * g
        one.step()
        other.step()
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q)


def test_no_gradient_no_step_and_zero_gradients_are_safe():
    ps = parameters()
    made = Muon(ps)
    gradients(ps, 0)
    made.step()
    before = [p.detach().clone() for p in ps]
    gradients(ps, 1)
    ps[0].grad = None
    for p in ps[1:]:
        p.grad = torch.zeros_like(p)
    made.step()
    assert torch.equal(ps[0], before[0])
    assert all(not torch.equal(p, b) and p.isfinite().all() for p, b in zip(ps[1:], before[1:], strict=True))
    fresh = nn.Parameter(torch.ones(3, 4))
    fresh.grad = torch.zeros_like(fresh)
    Muon([fresh]).step()
    assert torch.equal(fresh, torch.ones(3, 4))


def test_half_precision_parameters_have_wide_momentum_and_are_rounded_once():
    ps, qs = parameters(torch.bfloat16), parameters(torch.bfloat16)
    qs = [nn.Parameter(q.detach().float()) for q in qs]
    one, other = Muon(ps, 0.1, dtype="float32"), Muon(qs, 0.1, dtype="float32")
    for p, q, g in zip(ps, qs, gradients(ps, 0), strict=True):
        assert p.dtype == torch.bfloat16
        q.grad = g.float()
    one.step()
    other.step()
    for p, q in zip(ps, qs, strict=True):
        assert one.state[p]["momentum_buffer"].dtype == torch.float32
        assert torch.equal(p, q.bfloat16())


def test_channels_last_and_transposed_weights():
    p = nn.Parameter(parameters()[3].detach())
    q = nn.Parameter(p.detach().to(memory_format=torch.channels_last))
    r, s = nn.Parameter(parameters()[0].detach()), nn.Parameter(parameters()[0].detach().t().contiguous().t())
    assert not q.is_contiguous()
    assert not s.is_contiguous()
    one, other = Muon([p, r]), Muon([q, s])
    for seed in range(2):
        gradients([p, r], seed)
        q.grad, s.grad = (x.grad.clone() for x in (p, r))
        one.step()
        other.step()
    torch.testing.assert_close(p, q)
    torch.testing.assert_close(r, s)


def test_state_is_four_bytes_per_parameter_and_comes_back():
    ps, qs = parameters(torch.float32), parameters(torch.float32)
    one, other = Muon(ps), Muon(qs)
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


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"eps": -1.0},
        {"steps": 0},
        {"normalize": "max"},
        {"scale": "keller"},
        {"conv_scale": "square"},
        {"dtype": "half"},
        {"coefficients": [1.0, 2.0]},
    ],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}"):
        Muon(parameters(), **wrong)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\).*optimizer\.takes"):
        Muon([nn.Parameter(torch.zeros(3))])
