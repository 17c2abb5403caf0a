"""Maps on the singular values of matrices (Newhouse et al. 2025, arXiv:2507.13338), and caps on vectors in embeddings.

Matrices are (..., m, n), each by itself, in float32 or wider; results are new tensors. `unit` is the singular value
that counts as one: every map p here stands for unit · p(x / unit), with no pass over x for it.
"""

from __future__ import annotations

import functools
from math import sqrt

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import wide
from trainkit.optimizer.orthogonal import gram_of, newton_schulz, small_factor, times

# Steps of odd polynomials a s + b s³ + c s⁵. SIX never exceeds 0.9994, and is at least 0.9955 from 0.003 on.
SIX = tuple(
    (a / 1024, b / 1024, c / 1024)
    for a, b, c in (
        (3955, -8306, 5008),
        (3735, -6681, 3463),
        (3799, -6499, 3211),
        (4019, -6385, 2906),
        (2677, -3029, 1162),
        (2172, -1833, 682),
    )
)
HARD = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)
POWER_ITERATIONS = 16
EDGE = 1e-12  # relative; a bound exceeded by less is met


def orthogonalize(x: Tensor) -> Tensor:
    """All singular values to about 1, from below: SIX applied to x / (‖x‖_F + 1e-12). Zero stays zero."""
    return newton_schulz(x, steps=len(SIX), coefficients=SIX, eps=1e-12)


def hard_cap(x: Tensor, unit: float = 1.0) -> Tensor:
    """s <- about min(1, s): off by 0.034 at most, and never above 1.011, up to s = 3.5. From 4 on it breaks down."""
    y = x.reshape(-1, *x.shape[-2:])
    square, spare = (y.new_empty(len(y), min(y.shape[1:]), min(y.shape[1:])) for _ in range(2))
    triples = [(a, b / unit**2, c / unit**4) for a, b, c in HARD]
    return times(y, small_factor(gram_of(y, square), spare, triples), None).view(x.shape)


def soft_cap(x: Tensor, alpha: float, unit: float = 1.0) -> Tensor:
    """s <- s - alpha s³, then s <- s + alpha s³, so s - 3 alpha² s⁵ + …: nearly nothing below the cap.

    Taken as one polynomial of the smaller Gram matrix G, s (1 - z² (3 - 3 z + z²)) with z = alpha s²: two products of
    its size instead of a second pair of products with x.
    """
    z = gram(x) * (alpha / unit**2)
    square = z @ z
    inner = torch.add(square, z, alpha=-3)
    inner.diagonal(dim1=-2, dim2=-1).add_(3)
    factor = (square @ inner).neg_()
    factor.diagonal(dim1=-2, dim2=-1).add_(1)
    return x @ factor if tall(x) else factor @ x


def coupling(w_max: float, decay: float, update: float) -> float:
    """The alpha with which the soft cap brings k = w_max (1 - decay) + update back to w_max; 0 where k <= w_max.

    k is the largest singular value after a step from at most w_max, with decay = lr · weight decay and update the
    largest singular value of what the step adds. With z = alpha k² the equation is z² (z² - 3 z + 3) = 1 - w_max/k;
    its left side rises from 0 at 0 to 1 at 1, so there is one root: the smallest one of the quartic in alpha,
    -k⁹ alpha⁴ + 3 k⁷ alpha³ - 3 k⁵ alpha² + k - w_max = 0. Newton's method on its root, in Python floats.
    Up to k = 1.3 w_max the cap rises with s, so no smaller value ends above w_max either; beyond, some do.
    """
    k, excess = w_max * (1 - decay) + update, update - w_max * decay
    if excess <= EDGE * w_max:
        return 0.0
    goal = sqrt(excess / k)
    z = goal / sqrt(3)
    for _ in range(50):
        root = sqrt(z * z - 3 * z + 3)
        step = (z * root - goal) / (root + z * (2 * z - 3) / (2 * root))
        z -= step
        if abs(step) <= 1e-16 * z:
            break
    return z / k**2


def released_coupling(w_max: float, decay: float, update: float) -> float:
    """`coupling` as the authors' code has it: at most 1, and 1 where the step cannot leave the bound.

    At w_max = 1 that last value maps the singular value 1 to 0, which is why the cap here has 0 instead.
    """
    if update - w_max * decay < -EDGE * w_max:
        return 1.0
    return min(1.0, coupling(w_max, decay, update))


def svd_clip(x: Tensor, w_max: float, unit: float = 1.0) -> Tensor:
    """s <- min(s, w_max), through the eigenvectors of the smaller Gram matrix, in less time than an SVD.

    Squaring costs small singular values their accuracy, but what is subtracted has no part in theirs.
    """
    squares, vectors = torch.linalg.eigh(gram(x))
    # min(1, w_max / s) of s² that rounding may have made negative
    shrink = 1 - (w_max * unit / squares.clamp(min=(w_max * unit) ** 2).sqrt())
    excess = (vectors * shrink.unsqueeze(-2)) @ vectors.mT
    return x - (x @ excess if tall(x) else excess @ x)


def top(x: Tensor, *, iterations: int = POWER_ITERATIONS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value and its vectors, s: (..., 1, 1), u: (..., m, 1), v: (..., n, 1).

    By power iteration on the smaller Gram matrix, which is never formed, from a vector drawn with `seed`; s is never
    too large, and too small where the iteration has not told the top from what is next to it. A zero matrix has s = 0
    and no vectors (zeros on one side).
    """
    matrix = x if tall(x) else x.mT
    tiny = torch.finfo(x.dtype).tiny
    found = start_vector(matrix.shape[-1], seed, x.dtype, x.device).expand(*x.shape[:-2], -1, 1)
    for _ in range(iterations):
        found = ((matrix @ found).mT @ matrix).mT  # a row times the matrix: the column form is slow on a CPU
        found = found / norm(found).clamp(min=tiny)
    other = matrix @ found
    s = norm(other)
    other = other / s.clamp(min=tiny)
    return (s, other, found) if tall(x) else (s, found, other)


def spectral_hammer(x: Tensor, w_max: float, unit: float = 1.0, *, iterations: int = POWER_ITERATIONS) -> Tensor:
    """The largest singular value <- w_max, from either side; the others stay. Zero stays zero."""
    s, u, v = top(x, iterations=iterations)
    return x + ((w_max * unit - s) * u) @ v.mT


def spectral_decay(x: Tensor, rate: float, *, iterations: int = POWER_ITERATIONS) -> Tensor:
    """The largest singular value s <- (1 - rate) s; the others stay."""
    s, u, v = top(x, iterations=iterations)
    return x - (rate * s * u) @ v.mT


def spectral_normalize(x: Tensor, unit: float = 1.0, *, iterations: int = POWER_ITERATIONS) -> Tensor:
    """x / max(1, s), s the largest singular value."""
    return x / (top(x, iterations=iterations)[0] / unit).clamp(min=1)


def rms_cap(x: Tensor, *, axis: int = -1, limit: float = 1.0, inflation: float = 1.0) -> Tensor:
    """Vectors along `axis` over max(1 / inflation, rms / limit), rms = ‖vector‖ / sqrt(length).

    With inflation 1, vectors with more than `limit` get that; with a larger one, shorter vectors are lengthened by up
    to that factor, as the authors' embeddings do with gradients.
    """
    return x / rms_divisor(x, axis=axis, limit=limit, inflation=inflation)


def rms_divisor(x: Tensor, *, axis: int, limit: float, inflation: float = 1.0) -> Tensor:
    """What rms_cap divides by, in at least float32; x's shape with one entry on `axis`."""
    length = torch.linalg.vector_norm(x, dim=axis, keepdim=True, dtype=wide(x.dtype))
    return length.div_(limit * sqrt(x.shape[axis])).clamp_(min=1 / inflation)


def gram(x: Tensor) -> Tensor:
    """The smaller one of Xᵀ X and X Xᵀ."""
    return x.mT @ x if tall(x) else x @ x.mT


def tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)


@functools.cache
def start_vector(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, 1), normal. Kept: drawing one and copying it to the device every step would make the host wait."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, generator=generator, dtype=torch.float64).to(device, dtype)
