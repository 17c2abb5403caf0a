"""TrAct: a first layer whose weights move so that its pre-activations make a gradient step (Petersen et al. 2024).

The change of a pre-activation z = W x under a plain gradient step is proportional to x·x: bright images and frequent
words train the first layer faster than dim and rare ones. TrAct ("TrAct: Making First-layer Pre-Activations
Trainable", NeurIPS 2024) divides that out in closed form. Only the gradient of the weight is another one:

    grad W = Gᵀ X (Xᵀ X / b + lam I)^-1

X: (b, n) what goes in, one row per sample, position or patch; G: (b, m) the gradient of what comes out. Outputs, the
gradients of the input and of the bias, names and shapes of parameters, and the optimizer stay what they were; no
state. lam, 0.1 in the paper, is the only setting: large ones approach the plain gradient divided by lam.

Costs a product of X with itself and a solve with the smaller side, n x n, or b x b where b < n (the two are equal by
the push-through identity X (XᵀX/b + lam I)^-1 = (XXᵀ/b + lam I)^-1 X). The released code inverts; here it is a Cholesky
factor in float64 and solves in at least float32, and X (…)^-1 comes before the product with G, so that a coarse G of
autocast is never multiplied by an ill-conditioned matrix. b counts the rows that are seen at once: under gradient
accumulation and on several devices each micro-batch has its own XᵀX.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def whitened(x: Tensor, lam: float) -> Tensor:
    """X (Xᵀ X / b + lam I)^-1 over the last two axes, X: (…, b, n) -> same, in at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, columns = x.shape[-2:]
    small = x.mT @ x if columns <= rows else x @ x.mT
    # float64: where entries reach 1e4 · lam, a float32 factor of a positive definite matrix need not exist any more.
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    small = small.to(wide) / max(1, rows)
    small.diagonal(dim1=-2, dim2=-1).add_(lam)
    factor = torch.linalg.cholesky_ex(small)[0].to(x.dtype)  # _ex: does not wait for the device to report success
    if columns <= rows:
        return torch.cholesky_solve(x.mT, factor).mT
    return torch.cholesky_solve(x, factor)


Layer = TypeVar("Layer", bound=nn.Module)


class _WeightGradient(torch.autograd.Function):
    """z, made with a detached weight -> z itself, whose gradient also reaches `weight`, as compute(gradient, x)."""

    @staticmethod
    def forward(ctx, z: Tensor, x: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.mark_dirty(z)  # it is z itself that is returned, not a view, which the next layer could not write into
        ctx.save_for_backward(x)
        ctx.compute, ctx.dtype = compute, weight.dtype
        return z

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        (gradient,), (x,) = gradients, ctx.saved_tensors
        # Whatever autocast the backward pass runs in: the product must not be rounded to half precision.
        with torch.autocast(gradient.device.type, enabled=False):
            own = ctx.compute(gradient, x).to(ctx.dtype) if ctx.needs_input_grad[2] else None
        return gradient, None, own, None


def _attach(z: Tensor, x: Tensor, weight: Tensor, compute: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return z
    return _WeightGradient.apply(z, x.detach(), weight, compute)  # type: ignore[return-value]


class TrActLinear(nn.Linear):
    """nn.Linear with the weight gradient Gᵀ X (Xᵀ X / b + lam I)^-1; b: rows of the input, all axes but the last."""

    def __init__(self, *sizes: Any, lam: float = 0.1, **options: Any):
        super().__init__(*sizes, **options)
        self.lam = positive(lam)

    def forward(self, x: Tensor) -> Tensor:
        return _attach(F.linear(x, self.weight.detach(), self.bias), x, self.weight, self._weight_gradient)

    def _weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        y = whitened(x.reshape(-1, self.in_features), self.lam)
        return gradient.reshape(-1, self.out_features).to(y.dtype).mT @ y


class TrActConv2d(nn.Conv2d):
    """nn.Conv2d with the weight gradient Gᵀ X (Xᵀ X / b + lam I)^-1, X the patches: b = images · output positions rows
    of n = (input channels / groups) · kernel height · kernel width.

    Stride, dilation, every padding and its modes as in nn.Conv2d; each group of channels has its own Xᵀ X. (The
    released code leaves dilation, groups and padding modes out.)
    """

    def __init__(self, *sizes: Any, lam: float = 0.1, **options: Any):
        super().__init__(*sizes, **options)
        self.lam = positive(lam)

    def forward(self, x: Tensor) -> Tensor:
        z = self._conv_forward(x, self.weight.detach(), self.bias)
        return _attach(z, x, self.weight, self._weight_gradient)

    def _weight_gradient(self, gradient: Tensor, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x, gradient = x[None], gradient[None]
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(x, self.kernel_size, dilation=self.dilation, stride=self.stride)  # (B, C kh kw, L)
        rows = patches.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # (groups, B L, n)
        y = whitened(rows, self.lam)
        out = gradient.flatten(2).unflatten(1, (self.groups, -1)).permute(1, 2, 0, 3).flatten(2)  # (groups, m, B L)
        return (out.to(y.dtype) @ y).reshape(self.weight.shape)


class TrActEmbedding(nn.Embedding):
    """nn.Embedding as a linear layer on one-hot rows, whose Xᵀ X is diagonal: the gradient of a token's row divided by
    (count / b + lam), count: how often the token is among the b of the batch.

    With lam = 0.1 a token that makes up a tenth of the text moves half as far, per occurrence, as a rare one. Where the
    head shares the weight, the head's part of the gradient stays as it is. Raises ValueError for sparse gradients,
    max_norm and scale_grad_by_freq, which define gradients or weights of their own.
    """

    def __init__(self, *sizes: Any, lam: float = 0.1, **options: Any):
        super().__init__(*sizes, **options)
        if self.sparse or self.scale_grad_by_freq or self.max_norm is not None:
            raise ValueError("TrAct needs a plain embedding: leave out sparse, scale_grad_by_freq and max_norm")
        self.lam = positive(lam)

    def forward(self, tokens: Tensor) -> Tensor:
        z = F.embedding(tokens, self.weight.detach(), self.padding_idx)
        return _attach(z, tokens, self.weight, self._weight_gradient)

    def _weight_gradient(self, gradient: Tensor, tokens: Tensor) -> Tensor:
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        ones = torch.ones(tokens.numel(), dtype=gradient.dtype, device=tokens.device)
        count = ones.new_zeros(self.num_embeddings).index_add_(0, tokens.flatten(), ones)
        # Divided per occurrence, of which there are far fewer than rows in a vocabulary.
        gradient = gradient / (count / max(1, tokens.numel()) + self.lam)[tokens, None]
        skipped = -1 if self.padding_idx is None else self.padding_idx
        return torch.ops.aten.embedding_dense_backward(gradient, tokens, self.num_embeddings, skipped, False)


TRACT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TrActLinear,
    nn.Conv2d: TrActConv2d,
    nn.Embedding: TrActEmbedding,
}


def first_layer(layer: type[Layer], kind: str, lam: float) -> Callable[..., Layer]:
    """What builds a model's first layer: the class `layer` for kind="plain", its TrAct form for "tract"."""
    if kind not in ("plain", "tract"):
        raise ValueError(f"model.first_layer is plain or tract; got {kind!r}")
    return layer if kind == "plain" else partial(TRACT[layer], lam=positive(lam))  # type: ignore[return-value]


def positive(lam: float) -> float:
    if not lam > 0:
        raise ValueError(f"model.tract_lambda must be above 0, as it keeps the solve well-posed; got {lam}. Try 0.1")
    return lam
