"""The length of the tensors in each part of a network: the sum behind norms of gradients, weights and steps."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, reduce

import torch
from torch import Tensor

from trainkit.measure import shards


def norms_of(tensors: Sequence[Tensor]) -> Tensor:
    """‖x‖ of each tensor, (len(tensors),), in at least float32; of sharded ones that of the whole."""
    wide = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    return torch.stack(shards.norms(tensors, 2, wide))


def lengths(
    groups: Mapping[str, Sequence[Tensor]], norms: Callable[[Sequence[Tensor]], Tensor] = norms_of
) -> dict[str, Tensor]:
    """‖x‖ = sqrt(sum x²) over the tensors of each group, 0-d, on their device; labels as measure.sites gives them.

    A dotted label also counts into the total of what stands before its last dot (blocks.3.attn into blocks.3), and all
    count into "global"; a group without tensors is 0. Computed in at least float32. One foreach call and one scattered
    sum for all of it, and no waiting for the device. Of sharded tensors it is the length of the whole ones, with one
    transfer, so every process must ask alike. norms: what finds that of each tensor.
    """
    names, *pairs = _plan(tuple((label, len(members)) for label, members in groups.items()))
    tensors = [tensor for members in groups.values() for tensor in members]
    if not tensors:
        return dict.fromkeys(names, torch.zeros(()))
    squares = norms(tensors).square()
    rows, columns = (index.to(squares.device, non_blocking=True) for index in pairs)
    sums = squares.new_zeros(len(names)).index_add_(0, columns, squares[rows])
    return dict(zip(names, sums.sqrt_().unbind(), strict=True))


@lru_cache
def _plan(sizes: tuple[tuple[str, int], ...]) -> tuple[list[str], Tensor, Tensor]:
    """For groups of so many tensors: the sums' names; which tensor's square is added (k-th entry), and to which sum."""
    names = labels(dict(sizes))
    rows: list[int] = []
    columns: list[int] = []
    first = 0
    for label, size in sizes:
        for name in _above(label):
            rows += range(first, first + size)
            columns += [names.index(name)] * size
        first += size
    return names, torch.tensor(rows, dtype=torch.long), torch.tensor(columns, dtype=torch.long)


def counts(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, int]:
    """How many numbers each of those lengths is made of."""
    found = dict.fromkeys(labels(groups), 0)
    for label, members in groups.items():
        for name in _above(label):
            found[name] += sum(tensor.numel() for tensor in members)
    return found


def rms(groups: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """sqrt(mean x²) over the tensors of each group, and of the totals; groups without numbers are left out.

    Unlike a length it does not grow with the size of a layer, so layers of different widths compare.
    """
    sizes = counts(groups)
    return {name: length / sizes[name] ** 0.5 for name, length in lengths(groups).items() if sizes[name]}


def labels(groups: Mapping[str, object]) -> list[str]:
    """The groups' own labels, the totals above them, and "global", each once."""
    totals = (label.rpartition(".")[0] for label in groups)
    return list(dict.fromkeys([*groups, *filter(None, totals), "global"]))


def _above(label: str) -> list[str]:
    """What a label's numbers count into."""
    total = label.rpartition(".")[0]
    return [label, total, "global"] if total else [label, "global"]
