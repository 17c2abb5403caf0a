"""How many samples a step needs before its gradient can be trusted: the batch-size tests of AdAdaGrad."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, isnan, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainkit.measure.modes import uncompiled


@dataclass(frozen=True)
class Variances:
    """Variances of a single sample's gradient g_i about the mean ḡ, and the mean's squared length.

    total = sum over coordinates of Var(g_i); along = Var(<g_i, ḡ>); across = sum over coordinates of the variance of
    g_i - (<g_i, ḡ> / ‖ḡ‖²) ḡ; square = ‖ḡ‖². As in the released code, along and across are computed for each parameter
    tensor alone, with that tensor's part of ḡ, and added up, while square is that of all parameters together.
    """

    total: float
    along: float
    across: float
    square: float


def norm_test(v: Variances, *, eta: float) -> float:
    """Samples needed so that the gradient's expected error is at most eta times its length: total / (eta² ‖ḡ‖²)."""
    return _ratio(v.total / eta**2, v.square)


def inner_product_test(v: Variances, *, theta: float) -> float:
    """Samples needed so that the gradient points downhill with some certainty: along / (theta² ‖ḡ‖⁴)."""
    return _ratio(_ratio(v.along / theta**2, v.square), v.square)


def augmented_test(v: Variances, *, theta: float, nu: float) -> float:
    """The inner-product test or, for what is orthogonal to the gradient, across / (nu² ‖ḡ‖²): the larger of the two."""
    return max(inner_product_test(v, theta=theta), _ratio(v.across / nu**2, v.square))


def grown(batch: int, needed: float, most: int | None = None) -> int:
    """The next batch: what is needed, rounded up, never below `batch` and, unless `batch` is, never above `most`.

    A test without an outcome, after an overflow, changes nothing.
    """
    if isnan(needed) or (needed == inf and most is None):
        return batch
    if most is not None and needed >= most:
        return max(batch, most)
    return max(batch, ceil(needed))


def sums(stacks: Iterable[Tensor], mean: Iterable[Tensor], sizes: Sequence[int] | None = None) -> Tensor:
    """What `variances` is made of, additive over the processes that share the mean: (3,), float64.

    stacks: for each parameter its gradient in every group of samples, (groups, *shape); mean: for each parameter the
    step's gradient ḡ; sizes: samples per group, 1 unless told. With n_j samples in group j and d_j = x_j - ḡ, per
    tensor
        total = sum_j n_j ‖d_j‖²,  along = sum_j n_j <d_j, ḡ>²,  across = total - along / ‖ḡ‖².
    """
    found = []
    for stack, center in zip(stacks, mean, strict=True):
        narrow = torch.promote_types(stack.dtype, torch.float32)
        center = center.flatten().to(narrow)
        apart = stack.reshape(len(stack), -1).to(narrow) - center
        wide = torch.float32 if stack.device.type == "mps" else torch.float64  # fourth powers of small gradients
        weights = torch.tensor(sizes or [1] * len(stack), dtype=wide, device=stack.device)
        total, along = weights @ apart.square().sum(1).to(wide), weights @ (apart @ center).to(wide).square()
        square = center.square().sum().to(wide)
        # Rounding must not leave a negative rest where everything lies along ḡ; a zero ḡ has no direction.
        across = torch.where(square > 0, (total - along / square).clamp(min=0), total)
        found.append(torch.stack((total, along, across)))
    return torch.stack(found).sum(0)


def variances(totals: Sequence[float], square: float, *, groups: int, samples: int, batch: int) -> Variances:
    """Unbiased variances per sample from `sums`, over `groups` groups of `samples` samples in all, ḡ being the mean of
    `batch` samples that include them.

    A group mean of n_j samples varies 1/n_j as much as a sample, and ḡ contains it; so the expectation of
    sum_j n_j ‖x_j - ḡ‖² is (groups - samples / batch) times the variance of a sample, whatever the sizes of the groups.
    Groups of one sample that make up the batch give the usual divisor, batch - 1. For several processes the released
    code adds the mean of the variances within them and the (biased) variance of their means; that exceeds this by
    (1 - 1 / processes) / (samples per process) of the variance.
    """
    total, along, across = (value / (groups - samples / batch) for value in totals)
    return Variances(total, along, across, square)


def of_samples(stacks: Sequence[Tensor]) -> Variances:
    """The variances of a batch whose samples' gradients are given for each parameter, (samples, *shape)."""
    mean = [stack.mean(0) for stack in stacks]
    square = sum(float(torch.linalg.vector_norm(m)) ** 2 for m in mean)
    count = len(stacks[0])
    return variances(sums(stacks, mean).tolist(), square, groups=count, samples=count, batch=count)


def per_sample_gradients(
    model: nn.Module, loss: Callable[[Any, Any], Tensor], batch: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The gradient of loss(model, sample) for every sample of a batch of tensors: {parameter: (samples, *shape)}.

    Needs as many copies of the gradient as there are samples. Raises ValueError where the model cannot be
    differentiated so: statistics over the batch, or operations that torch.func does not know.
    """
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def single(parameters: dict[str, Tensor], *sample: Tensor) -> Tensor:
        def call(*inputs: Tensor) -> Any:
            return functional_call(model, parameters, inputs)

        return loss(call, tuple(part[None] for part in sample))

    try:
        batched = vmap(grad(single), in_dims=(None, *(0 for _ in batch)), randomness="different")
        with uncompiled(model), sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be batched once more
            return batched(trainable, *batch)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(
            "this model has no gradient per sample (statistics over the batch, or an operation that torch.func does "
            f"not know): {str(error).splitlines()[0]}. Estimate the variance from micro-batches instead"
        ) from error


def _ratio(variance: float, square: float) -> float:
    """variance / ‖ḡ‖²; 0 where nothing varies, so that a gradient of zeros needs nothing; NaN after an overflow."""
    if variance == 0:
        return 0.0
    if isnan(variance) or not isfinite(square):
        return nan
    return variance / square if square > 0 else inf
