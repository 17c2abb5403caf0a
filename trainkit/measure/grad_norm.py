"""The length of the gradient, by part of the network."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

BLOCK = 1 << 16  # elements


def grad_norm(groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, Tensor]:
    """‖g‖ = sqrt(sum g²) over the gradients of each group, 0-d, on their device; groups as measure.sites returns them.

    A dotted label also counts into the total of what stands before its last dot (blocks.3.attn into blocks.3), and all
    count into "global". Computed in at least float32; a parameter without a gradient counts 0. One foreach call and
    one scattered sum for all of it, and no waiting for the device.
    """
    totals = {label: label.rpartition(".")[0] for label in groups}
    names = list(dict.fromkeys([*groups, *filter(None, totals.values()), "global"]))
    place = {name: i for i, name in enumerate(names)}

    gradients: list[Tensor] = []
    rows: list[int] = []  # rows[k]: the gradient whose square is added to the sum number columns[k]
    columns: list[int] = []
    for label, parameters in groups.items():
        counts_into = [place[name] for name in (label, totals[label], "global") if name]
        for parameter in parameters:
            if parameter.grad is not None:
                rows += [len(gradients)] * len(counts_into)
                columns += counts_into
                gradients.append(parameter.grad)

    if not gradients:
        return dict.fromkeys(names, torch.zeros(()))
    wide = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
    squares = torch.stack(torch._foreach_norm(gradients, 2, wide)).square()
    index = torch.tensor([rows, columns]).to(squares.device, non_blocking=True)
    sums = squares.new_zeros(len(names)).index_add_(0, index[1], squares[index[0]])
    return dict(zip(names, sums.sqrt_().unbind(), strict=True))


def grad_norm_l1(parameters: Iterable[nn.Parameter]) -> Tensor:
    """sum |g| over all gradients, 0-d, on their device; in at least float32. What schedule=refined reads for Adam."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    wide = reduce(torch.promote_types, (g.dtype for g in gradients), torch.float32)
    if not gradients[0].is_cpu:
        return torch.stack(torch._foreach_norm(gradients, 1, wide)).sum()
    # On a CPU that call adds up one by one, 0.2 % off for an embedding in float32, and is slower than blocks in cache.
    blocks = (block for g in gradients for block in g.reshape(-1).split(BLOCK))
    return torch.stack([block.abs().sum(dtype=wide) for block in blocks]).sum()
