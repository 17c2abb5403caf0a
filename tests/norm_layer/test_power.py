import pytest
import torch
from torch import Tensor

from trainkit.norm_layer.power import PowerNorm

from .stateful import WIDTH, data, float64, state, train  # noqa: F401


class Reference:
    """PowerNorm from its equations, in plain steps; the group scaling is differentiated by autograd."""

    def __init__(self, width: int, groups: int, warmup: int, eps: float, forward_decay: float, backward_decay: float):
        self.groups, self.warmup, self.eps = groups, warmup, eps
        self.forward_decay, self.backward_decay = forward_decay, backward_decay
        self.phi, self.e, self.i = torch.ones(width), torch.zeros(width), 0

    def call(self, x: Tensor, gy: Tensor, pad: Tensor, gain: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        parts = [h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() for h in x.chunk(self.groups, -1)]
        u = torch.cat(parts, -1)
        self.i += 1
        s = u.detach()[~pad].square().mean(0)
        z = u.detach() / ((s if self.i <= self.warmup else self.phi) + self.eps).sqrt()
        if self.i < self.warmup:
            self.phi = self.phi * (self.i - 1) / self.i + s / self.i
        self.phi = self.forward_decay * self.phi + (1 - self.forward_decay) * s
        q = gain * gy - (1 - self.backward_decay) * self.e * z
        self.e = self.e + (q * z).mean((0, 1))
        u.backward(q / (s + self.eps).sqrt())
        return gain * z + bias, x.grad


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_equations(groups, warmup):
    knobs = {"groups": groups, "warmup": warmup, "eps": 1e-3, "forward_decay": 0.8, "backward_decay": 0.6}
    norm, reference = PowerNorm(WIDTH, count="call", **knobs), Reference(WIDTH, **knobs)
    with torch.no_grad():
        norm.gain.copy_(torch.randn(WIDTH))
        norm.bias.copy_(torch.randn(WIDTH))
    for x, gy in data(5):
        pad = torch.rand(x.shape[:2]) < 0.3
        expected = reference.call(x, gy, pad, norm.gain.detach(), norm.bias.detach())
        for a, b in zip(train(norm, x, gy, pad_mask=pad), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        assert torch.allclose(norm.running_square, reference.phi, rtol=1e-12)
        assert torch.allclose(norm.running_gradient, reference.e, rtol=1e-9)
        assert int(norm.steps) == reference.i


def test_first_step_makes_phi_the_batch_statistic():
    norm = PowerNorm(WIDTH, warmup=2)
    (x, gy), *_ = data(1)
    train(norm, x, gy)
    norm.advance()
    u = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(norm.running_square, u.square().mean((0, 1)), rtol=1e-12)


def test_eval_is_a_scale_per_channel_after_the_group_scaling():
    norm = PowerNorm(WIDTH, groups=2).eval()
    with torch.no_grad():
        norm.running_square.copy_(torch.rand(WIDTH))
    before, x = state(norm), torch.randn(3, 2, WIDTH)
    u = torch.cat([h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() for h in x.chunk(2, -1)], -1)
    assert torch.allclose(norm(x), u / (before["running_square"] + 1e-5).sqrt(), rtol=1e-12)


def test_no_second_derivatives():
    norm, x = PowerNorm(WIDTH), torch.randn(2, 3, WIDTH, requires_grad=True)
    (gx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gx.sum().backward()


@pytest.mark.parametrize("groups", [0, 3, 16])
def test_groups_that_do_not_divide_the_width(groups):
    with pytest.raises(ValueError, match=f"norm_layer.groups must divide the width 8; got {groups}"):
        PowerNorm(WIDTH, groups=groups)
