"""Newton-Schulz against its definition on singular values, and the batches of equal shape."""

import pytest
import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import zeros_like
from trainkit.optimizer.orthogonal import (
    MUON,
    amplification,
    by_shape,
    fast_bfloat16,
    lookahead,
    newton_schulz,
    per_step,
    shape_scale,
    working_dtype,
)

CUBIC = (1.5, -0.5, 0.0)
SHAPES = [(5, 9), (9, 5), (7, 7), (4, 16), (16, 4), (1, 6), (6, 1), (1, 1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_singular_values(x: Tensor, triples, eps=1e-7) -> Tensor:
    """U p(S / (‖S‖ + eps)) Vᵀ, an independent way to the same."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / (s.norm() + eps)
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ vt


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("triple", [MUON, CUBIC])
def test_each_matrix_of_a_batch_is_the_polynomial_of_its_singular_values(shape, triple):
    x = random(2, 3, *shape)
    kept = x.clone()
    got = newton_schulz(x, coefficients=triple)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(got[i, j], by_singular_values(x[i, j], [triple] * 5), rtol=1e-11, atol=1e-11)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("shape", [(5, 9), (4, 16)])
def test_one_triple_for_each_step(shape):
    x, triples = random(*shape), [MUON, CUBIC, (3.0, -3.2, 1.2)]
    got = newton_schulz(x, steps=3, coefficients=triples)
    torch.testing.assert_close(got, by_singular_values(x, triples), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_transposing_before_is_transposing_after(shape, dtype):
    x = random(*shape)
    one, other = newton_schulz(x, dtype=dtype), newton_schulz(x.mT, dtype=dtype).mT
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.05)


def test_singular_values_of_a_well_conditioned_matrix():
    s = torch.linalg.svdvals(newton_schulz(random(24, 64)))
    assert s.min() > 0.65
    assert s.max() < 1.25


def test_the_size_of_the_matrix_does_not_matter():
    x = random(6, 30)
    for factor in (1e-4, 1e6):
        torch.testing.assert_close(newton_schulz(factor * x, eps=0.0), newton_schulz(x, eps=0.0))


@pytest.mark.parametrize("small_side", [8, 40])  # 8: all steps on the Gram matrix
def test_float32_keeps_its_precision_with_tiny_singular_values(small_side):
    """Singular values down to 1e-6 of the largest, and one of exactly 0."""
    u, _ = torch.linalg.qr(random(small_side, small_side))
    v, _ = torch.linalg.qr(random(48, small_side, seed=1))
    s = torch.logspace(0, -6, small_side, dtype=torch.float64)
    s[-1] = 0
    x = u @ torch.diag(s) @ v.T
    want = newton_schulz(x)
    assert (newton_schulz(x.float()) - want).norm() < 2e-3 * want.norm()


def test_many_steps_do_not_take_the_short_way_where_it_amplifies_rounding():
    """(3/2, -1/2) converges to the polar factor; on the Gram matrix alone its errors would grow by 1.5^60."""
    assert amplification(per_step(CUBIC, 30)) > 1e10
    q = newton_schulz(random(8, 40).float(), steps=30, coefficients=CUBIC)
    torch.testing.assert_close(q @ q.T, torch.eye(8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(12, 5), (4, 9), (32, 32)])
def test_bfloat16_is_close(shape):
    x = random(*shape)
    want, got = newton_schulz(x), newton_schulz(x.float(), dtype=torch.bfloat16)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).norm() < 0.05 * want.norm()


def test_bfloat16_by_hand_is_what_the_units_do(monkeypatch):
    """On a CPU without them, products of rounded numbers in float32; here against torch's own bfloat16 products."""
    x = random(12, 20).float()
    monkeypatch.setattr("trainkit.optimizer.orthogonal.fast_bfloat16", lambda device: False)
    by_hand = newton_schulz(x, dtype=torch.bfloat16).double()
    monkeypatch.setattr("trainkit.optimizer.orthogonal.fast_bfloat16", lambda device: True)
    own = newton_schulz(x, dtype=torch.bfloat16).double()
    assert (by_hand - own).norm() < 0.04 * own.norm()


def test_zero_matrices_and_the_two_ways_to_normalize():
    for normalize in ("add", "clamp"):
        assert not newton_schulz(torch.zeros(2, 3, 4), eps=0.0, normalize=normalize).any()
    x = random(3, 4)
    x = 1e-3 * x / x.norm()
    one = newton_schulz(x, steps=1, coefficients=(1.0, 0.0, 0.0), eps=1e-3)
    torch.testing.assert_close(one, x / 2e-3)
    one = newton_schulz(x, steps=1, coefficients=(1.0, 0.0, 0.0), eps=1e-3, normalize="clamp")
    torch.testing.assert_close(one, x / 1e-3)
    with pytest.raises(ValueError, match="add or clamp"):
        newton_schulz(x, normalize="max")


def test_coefficients_that_do_not_fit():
    for wrong in ([1.0, 2.0], [MUON] * 4, [(1.0, 2.0)] * 5):
        with pytest.raises(ValueError, match="three numbers"):
            newton_schulz(random(3, 4), coefficients=wrong)


def test_batches_hold_equal_shapes_and_no_more_than_they_may():
    shapes = [(2, 3), (3, 2), (2, 3), (2, 3), (3, 2), (5, 5)]
    tensors = [torch.zeros(shape) for shape in shapes] + [torch.zeros(2, 3, dtype=torch.float64)]
    assert by_shape(tensors) == [[0, 2, 3], [1, 4], [5], [6]]
    assert by_shape(tensors, elements=12) == [[0, 2], [3], [1, 4], [5], [6]]
    assert by_shape(tensors, elements=0) == [[0], [2], [3], [1], [4], [5], [6]]
    assert by_shape([]) == []


def test_momentum_looks_ahead():
    g, buffer = random(3, 4), random(3, 4, seed=1)
    moved = buffer.clone()
    (u,) = lookahead([g], [moved], 0.9)
    torch.testing.assert_close(moved, 0.9 * buffer + 0.1 * g)
    torch.testing.assert_close(u, 0.1 * g + 0.9 * moved)
    (u,) = lookahead([g], [moved], 0.9, nesterov=False)
    assert u is moved


def test_half_precision_gradients_meet_a_wide_buffer():
    g = random(3, 4).bfloat16()
    buffer = zeros_like(g)
    (u,) = lookahead([g], [buffer], 0.5)
    assert u.dtype == buffer.dtype == torch.float32
    torch.testing.assert_close(u, 0.75 * g.float())


def test_scales():
    assert shape_scale("spectral", 8, 2) == 2
    assert shape_scale("spectral", 2, 8) == 1
    assert shape_scale("match_rms_adamw", 4, 25) == pytest.approx(1.0)
    assert shape_scale("ratio", 2, 8) == 0.5
    assert shape_scale("none", 2, 8) == 1
    with pytest.raises(ValueError, match=r"optimizer\.scale"):
        shape_scale("keller", 2, 8)


def test_the_dtype_to_work_in(monkeypatch):
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.bfloat16, torch.float32, torch.float64))
    for fast, auto in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr("trainkit.optimizer.orthogonal.fast_bfloat16", lambda device, fast=fast: fast)
        assert working_dtype("auto", half) == working_dtype("auto", single) == auto
        assert working_dtype("auto", double) == torch.float64
    assert working_dtype("parameter", half) == torch.float32
    assert working_dtype("bfloat16", double) == torch.bfloat16
    with pytest.raises(ValueError, match=r"optimizer\.dtype"):
        working_dtype("half", single)


def test_hardware_is_asked_about_once():
    fast_bfloat16.cache_clear()
    assert fast_bfloat16(torch.device("cpu")) == fast_bfloat16(torch.device("cpu"))
    assert fast_bfloat16.cache_info().hits == 1
    assert not fast_bfloat16(torch.device("meta"))
