"""The length of every gradient, found once per step whoever asks: the guard, the treatment, the log."""

from collections.abc import Sequence
from functools import reduce
from operator import attrgetter
from weakref import ref

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainkit.measure import shards


class _Latest:
    """The gradients that were looked at last, by weak references and how often each was written to, and their norms."""

    def __init__(self, gradients: Sequence[Tensor] = (), found: Tensor | None = None):
        self.version = _version_of_share if any(isinstance(g, DTensor) for g in gradients) else attrgetter("_version")
        self.seen = {id(g): (ref(g), self.version(g), place) for place, g in enumerate(gradients)}
        self.found = torch.empty(0) if found is None else found

    def places(self, gradients: Sequence[Tensor]) -> list[int] | None:
        """Where the norms of these stand, or None where one of them is new or was written to."""
        places = []
        for g in gradients:
            tensor, version, place = self.seen.get(id(g), (None, 0, 0))
            if tensor is None or tensor() is not g or version != self.version(g):
                return None
            places.append(place)
        return places


def _version_of_share(t: Tensor) -> int:
    """How often a tensor was written to; one that is sharded is by its share, and does not count that itself."""
    return (t._local_tensor if isinstance(t, DTensor) else t)._version


_latest = _Latest()


def norms(gradients: Sequence[Tensor]) -> Tensor:
    """‖g‖ of each, (len(gradients),), in at least float32: squares overflow in half precision.

    Of a sharded gradient it is that of the whole, so every process must ask alike. Asked again about those gradients
    or some of them, while nobody has written to them, it gives what it found.
    """
    global _latest
    wide = reduce(torch.promote_types, {g.dtype for g in gradients}, torch.float32)
    places = _latest.places(gradients) if _latest.found.dtype == wide else None
    if places is None:
        _latest = _Latest(gradients, torch.stack(shards.norms(gradients, 2, wide)))
        return _latest.found
    if places == list(range(len(_latest.found))):
        return _latest.found
    return torch.stack([_latest.found[place] for place in places])
