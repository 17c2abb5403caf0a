"""SinkGD against alternating normalization as it is defined, and what the paper says of it."""

import pytest
import torch
from torch import Tensor, nn

from trainkit.optimizer.sinkgd import SinkGD, sinkhorn

SHAPES = [(6, 4), (4, 9), (6, 4), (5, 2, 3, 2)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alternating(g: Tensor, iterations: int) -> Tensor:
    """Rows to sqrt(n), columns to sqrt(m), in turn."""
    m, n = g.shape
    for _ in range(iterations):
        g = n**0.5 * g / g.norm(dim=1, keepdim=True)
        g = m**0.5 * g / g.norm(dim=0, keepdim=True)
    return g


def scaled(g: Tensor, iterations: int = 5, eps: float = 0.0) -> Tensor:
    x = g if g.ndim == 3 else g.unsqueeze(0)
    out = torch.empty_like(x)
    rows = sinkhorn(x, out, iterations, eps)
    return (out * rows).view_as(g)


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_one_matrix_and_a_stack(iterations):
    g = random(3, 6, 4)
    want = torch.stack([alternating(t, iterations) for t in g])
    torch.testing.assert_close(scaled(g, iterations), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled(g[0], iterations), want[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_against_a_loop(decay):
    ps = [nn.Parameter(random(*s, seed=i)) for i, s in enumerate(SHAPES)]
    want = [p.detach().clone() for p in ps]
    made = SinkGD(ps, 0.1, 0.5, 3, decay)
    for seed in range(3):
        for i, p in enumerate(ps):
            p.grad = random(*p.shape, seed=10 * seed + i)
            x = alternating(p.grad.flatten(1), 3).view_as(p)
            want[i] = (1 - 0.1 * decay) * want[i] - 0.1 * 0.5 * x
        made.step()
    for p, w in zip(ps, want, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_columns_are_exact_and_rows_approached():
    g = random(8, 5)
    errors = []
    for iterations in (1, 3, 10, 60):
        x = scaled(g, iterations)
        torch.testing.assert_close(x.norm(dim=0), torch.full((5,), 8**0.5, dtype=torch.float64))
        errors.append((x.norm(dim=1) - 5**0.5).abs().max())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


def test_sizes_of_the_gradient_and_in_the_limit_of_its_rows_and_columns_do_not_matter():
    g = random(6, 7)
    torch.testing.assert_close(scaled(1e-5 * g, 2), scaled(g, 2))
    left, right = random(6, 1, seed=1).exp(), random(1, 7, seed=2).exp()
    torch.testing.assert_close(scaled(left * g * right, 200), scaled(g, 200), rtol=1e-6, atol=1e-6)


def test_signs_of_rank_one_stay():
    g = random(6, 1).sign() * random(1, 5, seed=1).sign()
    torch.testing.assert_close(scaled(g), g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_rows_and_columns_stay_and_the_others_do_not_notice(dtype):
    """A row of zeros adds nothing to any column, a column of zeros nothing to any row; only the lengths count it."""
    g = random(6, 5).to(dtype)
    g[2], g[:, 3] = 0, 0
    x = scaled(g)
    kept = alternating(g[[0, 1, 3, 4, 5]][:, [0, 1, 2, 4]], 5) * (6 / 5) ** 0.5
    torch.testing.assert_close(x[[0, 1, 3, 4, 5]][:, [0, 1, 2, 4]], kept, rtol=1e-5, atol=1e-5)
    assert not x[2].any()
    assert not x[:, 3].any()
    assert not scaled(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("size", [1e-15, 1e-12, 1e12])
def test_float32_gradients_far_from_one(size):
    g = random(20, 30)
    torch.testing.assert_close(scaled((size * g).float()), scaled(g).float(), rtol=1e-4, atol=1e-4)


def test_eps_holds_back_small_rows():
    g = random(4, 6)
    g[1] *= 1e-6
    want = scaled(g, 1).norm(dim=1)
    assert scaled(g, 1, eps=1e-3).norm(dim=1)[1] < 0.1 * want[1]
    torch.testing.assert_close(scaled(g, 3, eps=1e-8), scaled(g, 3))


def test_half_precision_parameters_are_rounded_once():
    w, g = random(6, 4).bfloat16(), random(6, 4, seed=1).bfloat16()
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.float())
    p.grad, q.grad = g, g.float()
    SinkGD([p], 1.0).step()
    SinkGD([q], 1.0).step()
    assert torch.equal(p, q.bfloat16())
    assert not torch.equal(p, w)


def test_weights_that_lie_otherwise_in_memory():
    w, g = random(5, 2, 3, 2), random(5, 2, 3, 2, seed=1)
    p, q = nn.Parameter(w.clone()), nn.Parameter(w.to(memory_format=torch.channels_last))
    p.grad, q.grad = g, g.to(memory_format=torch.channels_last)
    for made in (SinkGD([p]), SinkGD([q])):
        made.step()
    torch.testing.assert_close(p, q)
    assert not torch.equal(q, w)


def test_there_is_no_state():
    p = nn.Parameter(random(6, 4))
    p.grad = random(6, 4, seed=1)
    made = SinkGD([p])
    made.step()
    assert not [value for value in made.state[p].values() if isinstance(value, Tensor)]
    other = SinkGD([nn.Parameter(p.detach().clone())])
    other.load_state_dict(made.state_dict())
    for optimizer in (made, other):
        optimizer.param_groups[0]["params"][0].grad = random(6, 4, seed=2)
        optimizer.step()
    assert torch.equal(p, other.param_groups[0]["params"][0])


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"alpha": 0.0}, {"iterations": 0}, {"eps": -1e-8}])
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}"):
        SinkGD([nn.Parameter(torch.zeros(2, 2))], **wrong)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\).*optimizer\.takes"):
        SinkGD([nn.Parameter(torch.zeros(3))])
