"""How fast this machine multiplies matrices of the shapes that a model has: what MFU is a share of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trainkit.bench.timing import interleaved


def matmul_peak(
    model: nn.Module, tokens: int, dtype: torch.dtype, *, rounds: int = 5, clock: Callable[[], float] | None = None
) -> float:
    """FLOP/s over the three products of every linear layer: y = x Wᵀ, dx = dy W and dW = dyᵀ x, x (tokens, inputs).

    Layers of one shape are measured once and count as often as there are. Each product by the median of its rounds.
    """
    counts: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            shape = (module.in_features, module.out_features)
            counts[shape] = counts.get(shape, 0) + 1
    device = next(model.parameters()).device
    flops = seconds = 0.0
    for (inputs, outputs), count in counts.items():
        x, dy = (torch.randn(tokens, width, device=device, dtype=dtype) for width in (inputs, outputs))
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        products = {"y": _waiting(x, weight.mT), "dx": _waiting(dy, weight), "dw": _waiting(dy.mT, x)}
        interleaved(products, 1)  # takes the memory that is used again
        found = interleaved(products, rounds, **({} if clock is None else {"clock": clock}))
        flops += count * 6 * tokens * inputs * outputs
        seconds += count * sum(found.values())
    return flops / seconds


def _waiting(a: torch.Tensor, b: torch.Tensor) -> Callable[[], None]:
    def product() -> None:
        torch.matmul(a, b)
        if a.is_cuda:
            torch.cuda.synchronize()

    return product
