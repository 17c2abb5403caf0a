"""The length of the gradient, by part of the network."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from trainkit.measure import shards
from trainkit.measure.gradient_norms import norms
from trainkit.measure.lengths import lengths
from trainkit.measure.shards import is_sharded, local, summed

BLOCK = 1 << 17  # elements


def grad_norm(groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, Tensor]:
    """‖g‖ = sqrt(sum g²) over the gradients of each group, 0-d, on their device; groups as measure.sites returns them.

    A dotted label also counts into the total of what stands before its last dot (blocks.3.attn into blocks.3), and all
    count into "global". Computed in at least float32; a parameter without a gradient counts 0.
    """
    return lengths(gradients(groups), norms)


def gradients(groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, list[Tensor]]:
    """The gradients of each group's parameters, as far as there are."""
    return {label: [p.grad for p in parameters if p.grad is not None] for label, parameters in groups.items()}


def grad_norm_l1(parameters: Iterable[nn.Parameter]) -> Tensor:
    """sum |g| over all gradients, 0-d, on their device; in at least float32. What schedule=refined reads for Adam."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    wide = reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    if not gradients[0].is_cpu:
        return torch.stack(shards.norms(gradients, 1, wide)).sum()
    # On a CPU that call adds up one by one, 0.2 % off for an embedding in float32, and is slower than blocks in cache.
    if any(is_sharded(g) for g in gradients):
        return summed(torch.stack([_sum([local(g)], wide) for g in gradients]), gradients).sum()
    return _sum(gradients, wide)


def _sum(tensors: Iterable[Tensor], wide: torch.dtype) -> Tensor:
    """sum |t| over all of them."""
    return torch.stack([block.abs().sum(dtype=wide) for block in _blocks(tensors)]).sum()


def _blocks(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The numbers of all tensors in flat blocks of at most BLOCK: large ones are cut, small ones of a dtype joined."""
    joined: list[Tensor] = []
    count = 0
    for tensor in tensors:
        size = tensor.numel()
        if size > BLOCK:
            yield from tensor.reshape(-1).split(BLOCK)
            continue
        if joined and (count + size > BLOCK or tensor.dtype != joined[0].dtype):
            yield _flatten_dense_tensors(joined)
            joined, count = [], 0
        joined.append(tensor)
        count += size
    if joined:
        yield _flatten_dense_tensors(joined)
