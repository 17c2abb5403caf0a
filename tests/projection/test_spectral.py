"""The maps on singular values, against singular value decompositions."""

from math import sqrt

import pytest
import torch

from trainkit.projection import spectral

from .toy import with_values

pytestmark = pytest.mark.usefixtures("float64")
SHAPES = pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6), (3, 12)], ids=str)


def through(x, f):
    """x with f of its singular values in their place."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return (u * f(s).unsqueeze(-2)) @ vh


def polynomials(s, triples):
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return s


@SHAPES
@pytest.mark.parametrize("unit", [1.0, 0.3])
def test_maps_are_functions_of_the_singular_values(shape, unit):
    x = torch.randn(3, *shape) * 0.3
    cases = [
        (spectral.hard_cap(x, unit), lambda s: unit * polynomials(s / unit, spectral.HARD)),
        (spectral.soft_cap(x, 0.2, unit), lambda s: unit * polynomials(s / unit, [(1, -0.2, 0), (1, 0.2, 0)])),
        (spectral.svd_clip(x, 0.7, unit), lambda s: s.clamp(max=0.7 * unit)),
        (spectral.svd_clip(x, 50.0, unit), lambda s: s),
    ]
    for actual, f in cases:
        torch.testing.assert_close(actual, through(x, f), rtol=1e-10, atol=1e-12)
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    orthogonal = through(x / norm, lambda s: polynomials(s, spectral.SIX))
    torch.testing.assert_close(spectral.orthogonalize(x), orthogonal, rtol=1e-9, atol=1e-10)


def test_orthogonal_values_stay_below_one():
    s = torch.cat([torch.logspace(-6, 0, 2000), torch.linspace(0.003, 1, 2000)])
    mapped = polynomials(s, spectral.SIX)
    assert mapped.max() <= 0.99934
    assert mapped[s >= 0.003].min() >= 0.9955


def test_hard_cap_is_near_the_cap_up_to_three_and_a_half():
    s = torch.linspace(0, 3.5, 5000)
    mapped = torch.linalg.svdvals(spectral.hard_cap(torch.diag(s[::50])))
    torch.testing.assert_close(mapped.sort().values, polynomials(s[::50], spectral.HARD).sort().values)
    values = polynomials(s, spectral.HARD)
    assert (values - s.clamp(max=1)).abs().max() <= 0.034
    assert values.max() <= 1.011


def test_soft_cap_leaves_small_values_alone_to_fifth_order():
    s, alpha = torch.linspace(0.05, 0.4, 8), 0.15
    mapped = spectral.soft_cap(torch.diag(s), alpha).diagonal()
    expansion = s - 3 * alpha**2 * s**5
    torch.testing.assert_close(mapped, expansion, rtol=0, atol=4 * alpha**3 * 0.4**7)
    assert (mapped - expansion).abs().max() > 1e-7  # it is an expansion, not the map
    assert ((s - mapped) / s**5 > 2.5 * alpha**2).all()


@pytest.mark.parametrize("w_max", [0.3, 1.0, 6.0, 100.0])
@pytest.mark.parametrize("update", [1e-6, 0.001, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_coupling_sends_the_largest_value_to_the_bound(w_max, update, decay):
    k = w_max * (1 - decay) + update
    alpha = spectral.coupling(w_max, decay, update)
    if k <= w_max:
        assert alpha == 0
        return
    assert abs(polynomials(torch.tensor(k), [(1, -alpha, 0), (1, alpha, 0)]).item() - w_max) <= 1e-12 * w_max
    below = polynomials(torch.linspace(0, k, 1000), [(1, -alpha, 0), (1, alpha, 0)]).max()
    assert (below <= w_max * (1 + 1e-12)) == (k <= 1.3 * w_max)
    quartic = [-(k**9), 3 * k**7, -3 * k**5, 0, update - w_max * decay]
    terms = [c * alpha ** (4 - i) for i, c in enumerate(quartic)]
    assert abs(sum(terms)) <= 1e-12 * max(map(abs, terms))


def test_released_coupling_is_at_most_one_and_one_without_a_root():
    assert spectral.released_coupling(2.0, 0.1, 0.1) == 1.0
    assert spectral.released_coupling(0.1, 0.0, 0.1) == 1.0 < spectral.coupling(0.1, 0.0, 0.1)
    assert spectral.released_coupling(0.5, 0.1, 0.05) == 0.0
    assert spectral.released_coupling(1.0, 0.0, 0.1) == spectral.coupling(1.0, 0.0, 0.1)


@SHAPES
def test_top_is_the_first_triple_and_never_too_large(shape):
    values = torch.tensor([2.5, 0.9, 0.4])
    x = torch.stack([with_values(values, *shape, seed=i) for i in range(2)])
    s, u, v = spectral.top(x)
    torch.testing.assert_close(s.flatten(), torch.full((2,), 2.5))
    torch.testing.assert_close(x @ v, s * u, rtol=1e-7, atol=1e-7)
    noise = torch.randn(20, *shape)
    found = spectral.top(noise)[0].flatten()
    assert (found <= torch.linalg.matrix_norm(noise, 2) * (1 + 1e-12)).all()
    assert (found >= 0.9 * torch.linalg.matrix_norm(noise, 2)).all()
    assert torch.equal(found, spectral.top(noise)[0].flatten())
    assert (spectral.top(noise, iterations=1)[0].flatten() < found).all()


@SHAPES
@pytest.mark.parametrize("unit", [1.0, 1.7])
def test_maps_of_the_top_value_leave_the_others(shape, unit):
    values = torch.tensor([2.5, 0.9, 0.4])
    x = with_values(values, *shape)

    def changed(y):
        return torch.linalg.svdvals(y)[:3]

    for w_max in (0.95, 3.0):
        hammered = changed(spectral.spectral_hammer(x, w_max, unit))
        torch.testing.assert_close(hammered, values.clone().index_fill_(0, torch.tensor(0), w_max * unit))
    torch.testing.assert_close(changed(spectral.spectral_decay(x, 0.1)), torch.tensor([2.25, 0.9, 0.4]))
    torch.testing.assert_close(changed(spectral.spectral_normalize(x, unit)), values / 2.5 * unit)
    torch.testing.assert_close(spectral.spectral_normalize(x, 3.0), x)


@pytest.mark.parametrize("axis", [-1, -2])
def test_rms_cap(axis):
    x = torch.randn(7, 4) * torch.logspace(-2, 1, 7).unsqueeze(1)
    rms = x.square().mean(axis, keepdim=True).sqrt()
    torch.testing.assert_close(spectral.rms_cap(x, axis=axis), x / rms.clamp(min=1))
    torch.testing.assert_close(spectral.rms_cap(x, axis=axis, limit=0.5), x / (2 * rms).clamp(min=1))
    torch.testing.assert_close(spectral.rms_cap(x, axis=axis, inflation=16), x / rms.clamp(min=1 / 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_matrices_stay_zero(dtype):
    x = torch.zeros(2, 4, 3, dtype=dtype)
    maps = [
        spectral.orthogonalize,
        spectral.hard_cap,
        lambda t: spectral.soft_cap(t, 0.1),
        lambda t: spectral.svd_clip(t, 1.0),
        lambda t: spectral.spectral_hammer(t, 1.0),
        lambda t: spectral.spectral_decay(t, 0.1),
        spectral.spectral_normalize,
        spectral.rms_cap,
    ]
    for f in maps:
        assert torch.equal(f(x), x)


def test_svd_clip_in_float32_keeps_small_values():
    values = torch.logspace(1, -4, 6)
    x = with_values(values, 9, 7)
    clipped = spectral.svd_clip(x.float(), 1.0)
    torch.testing.assert_close(clipped.double(), through(x, lambda s: s.clamp(max=1)), rtol=0, atol=2e-6 * sqrt(10))
