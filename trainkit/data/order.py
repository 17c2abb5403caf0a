"""A random order of any number of items that is never written down: each place is computed when it is asked for.

For corpora of billions of windows, whose shuffled order as an array would take eight bytes for each. The permutation is
the generalized Feistel cipher of Black & Rogaway (2002): a place is written as two digits of about sqrt(count), and
each round adds to one of them a hash of the other and of a key, which can be undone whatever the hash. The few results
that lie beyond the last item go through it once more.
"""

from __future__ import annotations

import numpy as np

ROUNDS = 8  # four suffice where the digits are large (Luby & Rackoff 1988); small ones, of few items, need more
FIRST, SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = tuple(np.uint64(by) for by in (30, 27, 31))


class Order:
    """A permutation of range(count) that follows from `bits` alone; called with places, it tells the items there."""

    def __init__(self, count: int, bits: np.random.PCG64):
        side = max(int(np.ceil(np.sqrt(count))), 1)
        self.count, self.base = np.uint64(count), np.uint64(side)
        self.keys = [(bits.random_raw(), np.uint64(base)) for base in (side, -(-count // side)) * (ROUNDS // 2)]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """int64 (n,) in [0, count) -> int64 (n,) in [0, count)."""
        items = self._cipher(places.astype(np.uint64))
        while len(beyond := np.flatnonzero(items >= self.count)):
            items[beyond] = self._cipher(items[beyond])
        return items.astype(np.int64)

    def _cipher(self, values: np.ndarray) -> np.ndarray:
        other, digit = np.divmod(values, self.base)
        for key, base in self.keys:  # after an even number of rounds, both digits are in their places again
            digit, other = other, (digit + _hash(other + np.uint64(key)) % base) % base
        return other * self.base + digit


def _hash(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014); uint64 wraps round."""
    x = (x ^ (x >> SHIFTS[0])) * FIRST
    x = (x ^ (x >> SHIFTS[1])) * SECOND
    return x ^ (x >> SHIFTS[2])
