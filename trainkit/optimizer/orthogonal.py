"""What methods for matrices share: orthogonal factors by Newton-Schulz, batches of equal shape, momentum."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import MultiTensorOptimizer, Tensors, descend, run, wide

Triple = tuple[float, float, float]
MUON: Triple = (3.4445, -4.7750, 2.0315)  # steepest at 0; five steps bring singular values >= 0.01 into [0.68, 1.14]
STACK, STACK_CPU = 1 << 24, 1 << 17  # elements in a stack of matrices: 64 MiB and 512 KiB in float32


@torch.no_grad()
def newton_schulz(
    x: Tensor,
    *,
    steps: int = 5,
    coefficients: Sequence[float] | Sequence[Sequence[float]] = MUON,
    eps: float = 1e-7,
    normalize: str = "add",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """X <- x / (‖x‖_F + eps), then `steps` times X <- a X + b (X Xᵀ) X + c (X Xᵀ)² X, so about U Vᵀ of x = U S Vᵀ.

    x: (..., m, n), each matrix by itself; never written to. Singular vectors stay, singular values go through the odd
    polynomials a s + b s³ + c s⁵. coefficients: one triple (a, b, c) for all steps, or one for each. normalize: "add"
    as above, "clamp" divides by max(‖x‖_F, eps). dtype: of the iteration and of the result; None is that of x. Zero
    matrices stay zero. Memory: two copies of x and two to four matrices of the smaller side.

    The polynomial is taken of the smaller of X Xᵀ and Xᵀ X, so nothing is transposed. In float32 and float64 a I is
    part of it, so nothing is added; and where one side is at least twice the other, and rounding leaves room for it,
    all steps are taken on that small matrix, and x is multiplied once, at the end: 0.58 of the operations at 4:1, 0.84
    at 2:1. In half precision a X is added before the product is rounded, which is more than twice as exact. A CPU
    without units for bfloat16 multiplies the rounded numbers in float32: the same products, sooner than torch's own.
    """
    triples = per_step(coefficients, steps)
    dtype = dtype or x.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    by_hand = half and x.is_cpu and not fast_bfloat16(x.device)
    y = normalized(x, eps, normalize).to(dtype)
    y = y.reshape(-1, *y.shape[-2:]).to(torch.float32 if by_hand else dtype)
    small, large = sorted(y.shape[-2:])
    gram, factor = (y.new_empty(len(y), small, small) for _ in range(2))
    if not half and large >= 2 * small and amplification(triples) * torch.finfo(dtype).eps < 0.05:
        y = times(y, small_factor(gram_of(y, gram), factor, triples), None)
    else:
        other = torch.empty_like(y)
        for a, b, c in triples:
            gram_of(y, gram)
            if by_hand:
                rounded(gram, dtype)
            polynomial(gram, factor, (0.0 if half else a, b, c))
            if by_hand:
                rounded(factor, dtype)
            times(y, factor, other, plus=a if half else 0.0)
            if by_hand:
                rounded(other, dtype)
            y, other = other, y
    return y.to(dtype).view(x.shape)


def normalized(x: Tensor, eps: float, normalize: str) -> Tensor:
    """x over its Frobenius norm; a new tensor, in at least float32."""
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide(x.dtype))
    if normalize == "add":
        norm += eps
    elif normalize == "clamp":
        norm.clamp_(min=eps)
    else:
        raise ValueError(f"normalize is add or clamp; got {normalize!r}")
    return x / norm.clamp_(min=torch.finfo(norm.dtype).tiny)  # eps=0 leaves zero matrices zero as well


def per_step(coefficients: Sequence[float] | Sequence[Sequence[float]], steps: int) -> list[Triple]:
    """The triple (a, b, c) of each step."""
    if steps < 1:
        raise ValueError(f"optimizer.steps must be at least 1; got {steps}")
    one = not isinstance(coefficients[0], Sequence)
    triples = [coefficients] * steps if one else list(coefficients)
    if len(triples) != steps or any(len(triple) != 3 for triple in triples):  # type: ignore[arg-type]
        raise ValueError(
            f"optimizer.coefficients are three numbers, or three for each of the {steps} steps; got {coefficients}"
        )
    return [tuple(map(float, triple)) for triple in triples]  # type: ignore[misc, arg-type]


def amplification(triples: Sequence[Triple]) -> float:
    """What the polynomials multiply the smallest eigenvalues of a Gram matrix by, and the rounding errors in it."""
    return math.prod(max(1.0, a * a) for a, _, _ in triples)


def gram_of(y: Tensor, out: Tensor) -> Tensor:
    """Yᵀ Y of tall matrices, Y Yᵀ of others."""
    return torch.bmm(y.mT, y, out=out) if y.shape[-2] > y.shape[-1] else torch.bmm(y, y.mT, out=out)


def times(y: Tensor, factor: Tensor, out: Tensor | None, *, plus: float = 0.0) -> Tensor:
    """The factor on the smaller side of Y, and `plus` Y."""
    pair = (y, factor) if y.shape[-2] > y.shape[-1] else (factor, y)
    return torch.baddbmm(y, *pair, beta=plus, out=out) if plus else torch.bmm(*pair, out=out)


def rounded(t: Tensor, dtype: torch.dtype) -> None:
    t.copy_(t.to(dtype))


def polynomial(gram: Tensor, out: Tensor, triple: Triple) -> Tensor:
    """a I + b A + c A² of the Gram matrix A."""
    a, b, c = triple
    if c:
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=out)
    else:
        torch.mul(gram, b, out=out)
    if a:
        out.diagonal(dim1=-2, dim2=-1).add_(a)
    return out


def small_factor(gram: Tensor, factor: Tensor, triples: Sequence[Triple]) -> Tensor:
    """The product of all polynomials P_k of A_{k+1} = (A_k P_k) P_k; P_k and A_k commute. Overwrites both arguments."""
    product, spare = None, torch.empty_like(gram)
    for k, triple in enumerate(triples):
        polynomial(gram, factor, triple)
        if k + 1 < len(triples):
            torch.bmm(gram, factor, out=spare)
            torch.bmm(spare, factor, out=gram)
        if product is None:
            product = factor.clone()
        else:
            product, spare = torch.bmm(product, factor, out=spare), product
    return factor if product is None else product


def shape_scale(name: str, m: int, n: int) -> float:
    """What an orthogonal update of an (m, n) matrix is multiplied by.

    spectral: sqrt(max(1, m/n)). match_rms_adamw: 0.2 sqrt(max(m, n)), so that entries have AdamW's RMS of about 0.2.
    ratio: sqrt(m/n). none: 1.
    """
    match name:
        case "spectral":
            return math.sqrt(max(1.0, m / n))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        case "ratio":
            return math.sqrt(m / n)
        case "none":
            return 1.0
    raise ValueError(f"optimizer.scale is spectral, match_rms_adamw, ratio or none; got {name!r}")


def working_dtype(name: str, p: Tensor) -> torch.dtype:
    """The dtype that `optimizer.dtype` means for a parameter.

    parameter: p's, at least float32. auto: bfloat16 where the hardware multiplies it faster than float32 and p is not
    float64, else as parameter. bfloat16, float32, float64: these.
    """
    if name not in ("auto", "parameter", "bfloat16", "float32", "float64"):
        raise ValueError(f"optimizer.dtype is auto, parameter, bfloat16, float32 or float64; got {name!r}")
    if name == "auto" and p.dtype != torch.float64 and fast_bfloat16(p.device):
        return torch.bfloat16
    return wide(p.dtype) if name in ("auto", "parameter") else getattr(torch, name)


@functools.cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix units for bfloat16 are there; asked once per device."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return False


def by_shape(tensors: Sequence[Tensor], *, elements: int | None = None) -> list[list[int]]:
    """Indices of the tensors that can be stacked: same shape, dtype and device, at most `elements` entries together.

    elements: None is STACK on an accelerator, to fill it, and STACK_CPU on a CPU, to stay in its cache.
    """
    found: dict[tuple[object, ...], list[list[int]]] = {}
    for i, t in enumerate(tensors):
        limit = elements if elements is not None else STACK_CPU if t.is_cpu else STACK
        lists = found.setdefault((t.shape, t.dtype, t.device), [[]])
        if lists[-1] and (len(lists[-1]) + 1) * t.numel() > limit:
            lists.append([])
        lists[-1].append(i)
    return [indices for lists in found.values() for indices in lists]


def lookahead(g: Tensors, m: Tensors, momentum: float, *, nesterov: bool = True) -> Tensors:
    """m <- μ m + (1 - μ) g, in place; then (1 - μ) g + μ m, or without nesterov m itself."""
    g = [t.to(buffer.dtype) for t, buffer in zip(g, m, strict=True)]
    torch._foreach_lerp_(m, g, 1 - momentum)
    return torch._foreach_lerp(g, m, momentum) if nesterov else m


def take(w: Tensors, u: Tensor, lr: float, decay: float) -> None:
    """w <- (1 - lr decay) w - lr u for parameters of one shape and a stack u of what they are moved by."""
    moves = u.view(-1, *w[0].shape).unbind()
    if u.dtype == w[0].dtype:  # one pass over either: no need of blocks
        descend(w, moves, lr, decay)
    else:
        run(descend, w, moves, now={"lr": lr}, decay=decay)


def matrices(t: Tensor) -> Tensor:
    """A filter bank as the matrix (out, the rest), two and three axes as they are."""
    return t.flatten(1) if t.ndim > 3 else t


def needs_matrices(optimizer: MultiTensorOptimizer, params: Sequence[Tensor]) -> None:
    """ValueError for vectors, which the method is not defined for."""
    for p in params:
        if p.ndim < 2:
            raise ValueError(
                f"{type(optimizer).__name__} steps matrices, this parameter has shape {tuple(p.shape)}. "
                "Try optimizer.takes=[matrix] optimizer/rest=adamw"
            )
