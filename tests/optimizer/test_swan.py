"""SWAN against its two steps written out, with inverse roots by eigenvalues."""

import pytest
import torch
from torch import Tensor, nn

from trainkit.optimizer.swan import SWAN, normalize, polar

SHAPES = [(4, 9), (9, 4), (4, 9), (3, 2, 2, 3)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x @ x.T)
    return vectors @ torch.diag(values**-0.5) @ vectors.T @ x


def direction(g: Tensor, form: str, rescale: bool = True) -> Tensor:
    if g.shape[0] > g.shape[1]:
        return direction(g.T, form, rescale).T
    n = g.shape[1]
    if form == "multinorm":
        return n**0.5 * whitened(n**0.5 * g / g.norm(dim=1, keepdim=True))
    x = (g - g.mean(1, keepdim=True)) / g.std(1, correction=0, keepdim=True)
    z = whitened(x)
    return z * x.norm() / z.norm() if rescale else z


def parameters(shapes=SHAPES) -> list[nn.Parameter]:
    ps = [nn.Parameter(random(*s, seed=i)) for i, s in enumerate(shapes)]
    for i, p in enumerate(ps):
        p.grad = random(*p.shape, seed=10 + i)
    return ps


@pytest.mark.parametrize("form", ["swan", "multinorm"])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(("whitening", "steps"), [("exact", 10), ("newton_schulz", 40)])
def test_against_a_loop(form, rescale, whitening, steps):
    ps = parameters()
    want = [(1 - 0.1 * 0.2) * p - 0.1 * direction(p.grad.flatten(1), form, rescale).view_as(p) for p in ps]
    SWAN(ps, 0.1, 0.2, form=form, rescale=rescale, whitening=whitening, steps=steps).step()
    for p, w in zip(ps, want, strict=True):
        torch.testing.assert_close(p, w, rtol=1e-8, atol=1e-8)


def test_the_iteration_is_the_published_one():
    """Y <- β Y (3 I - Z Y), Z <- β (3 I - Z Y) Z, both from the old pair; then Z X."""
    (p,) = parameters([(4, 9)])
    beta, steps, eye = 0.4, 7, torch.eye(4, dtype=torch.float64)
    x = normalize(p.grad, centred=True)
    unit = x / x.norm()
    y, z = unit @ unit.T, eye
    for _ in range(steps):
        y, z = beta * y @ (3 * eye - z @ y), beta * (3 * eye - z @ y) @ z
    want = p.detach() - 0.1 * z @ unit
    SWAN([p], 0.1, steps=steps, beta=beta, rescale=False).step()
    torch.testing.assert_close(p.detach(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_normalized_lines_and_orthogonal_directions(shape):
    x = normalize(random(*shape), centred=True)
    x = x if shape[0] < shape[1] else x.T
    torch.testing.assert_close(x.mean(1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.square().mean(1), torch.ones(4, dtype=torch.float64))
    q = polar(x)
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("whitening", ["exact", "newton_schulz"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_centred_square_matrix_has_a_direction_that_is_left_out(whitening, dtype):
    p = nn.Parameter(torch.zeros(6, 6, dtype=dtype))
    p.grad = random(6, 6).to(dtype)
    SWAN([p], 1.0, whitening=whitening, rescale=False, steps=30).step()
    s = torch.linalg.svdvals(p.detach())
    torch.testing.assert_close(s[:5], torch.ones(5, dtype=dtype), rtol=0, atol=1e-3)
    assert s[5] < 1e-2
    assert p.isfinite().all()


@pytest.mark.parametrize("whitening", ["exact", "newton_schulz"])
def test_rows_that_do_not_vary_and_zero_gradients_stay(whitening):
    ps = parameters([(4, 9), (4, 9)])
    before = [p.detach().clone() for p in ps]
    ps[0].grad[2] = 0.1  # its mean is rounded
    ps[1].grad.zero_()
    SWAN(ps, 0.1, whitening=whitening).step()
    torch.testing.assert_close(ps[0][2], before[0][2])
    assert not torch.equal(ps[0][0], before[0][0])
    assert torch.equal(ps[1], before[1])


@pytest.mark.parametrize("form", ["swan", "multinorm"])
def test_entries_have_root_mean_square_one_whatever_the_gradient(form):
    ps, qs = parameters(), parameters()
    before = [p.detach().clone() for p in ps]
    for q in qs:
        q.grad = 1e-6 * q.grad
    for group in (ps, qs):
        SWAN(group, 0.1, form=form, whitening="exact").step()
    for p, q, start in zip(ps, qs, before, strict=True):
        torch.testing.assert_close(p, q)
        assert (p - start).square().mean().sqrt().item() == pytest.approx(0.1, rel=1e-6)


@pytest.mark.parametrize("whitening", ["exact", "newton_schulz"])
@pytest.mark.parametrize("form", ["swan", "multinorm"])
def test_sums_of_rows_stay_under_centring_only(form, whitening):
    ps = parameters([(4, 9), (9, 4)])
    before = [p.detach().clone() for p in ps]
    SWAN(ps, 0.1, form=form, whitening=whitening).step()
    for p, start, axis in zip(ps, before, (1, 0), strict=True):
        assert torch.allclose(p.sum(axis), start.sum(axis)) == (form == "swan")


def test_half_precision_parameters_are_rounded_once():
    (p,) = parameters([(4, 9)])
    p = nn.Parameter(p.detach().bfloat16())
    q = nn.Parameter(p.detach().float())
    p.grad = random(4, 9).bfloat16()
    q.grad = p.grad.float()
    SWAN([p], 1.0, dtype="float32").step()
    SWAN([q], 1.0, dtype="float32").step()
    assert torch.equal(p, q.bfloat16())


def test_there_is_no_state():
    (p,) = parameters([(4, 9)])
    made = SWAN([p])
    made.step()
    assert not [value for value in made.state[p].values() if isinstance(value, Tensor)]


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"form": "norm"}, {"whitening": "qr"}, {"steps": 0}, {"beta": 1.0}, {"dtype": "half"}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}"):
        SWAN(parameters(), **wrong)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(3,\).*optimizer\.takes"):
        SWAN([nn.Parameter(torch.zeros(3))])
