"""Buffers of past samples: a fixed number of places, what is kept in them, and random draws from them."""

from __future__ import annotations

import warnings
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.learner.learner import Stream


class Items(NamedTuple):
    """Samples of a buffer. raw: (k, C, H, W), as a stream's batch has them; labels, task_ids: (k,); logits: (k, K)."""

    raw: Tensor
    labels: Tensor
    task_ids: Tensor
    logits: Tensor | None = None


class Buffer:
    """`size` places for samples, which lie where the batches do: on the accelerator, if there is one.

    A leaf says which place an incoming sample takes (`places`) and which places are taken (`filled`). Of samples that
    arrive together and take the same place, the last stays, as if they had come one by one. All randomness, that of the
    draws and that of their augmentation, comes from one generator on the CPU, which starts from the stream's seed and
    the rank and is saved with the contents. With several ranks each keeps what it sees itself, in size / ranks places.
    """

    def __init__(self, size: int, stream: Stream):
        if size < stream.world:
            needs = f"learner.buffer_size must be at least 1 on each of the {stream.world} processes"
            raise ValueError(f"{needs}; got {size}. learner=finetune trains without a buffer")
        if size % stream.world and stream.rank == 0:
            warnings.warn(
                f"learner.buffer_size={size} cannot be shared out among {stream.world} processes: each keeps "
                f"{size // stream.world}, {size // stream.world * stream.world} in all",
                stacklevel=2,
            )
        self.size = size // stream.world
        self.generator = torch.Generator().manual_seed(seed_of(stream.seed, stream.rank))
        self._stored: dict[str, Tensor] = {}

    def places(self, labels: Tensor, task_ids: Tensor) -> Tensor:
        """(B,), on the CPU: the place of each incoming sample, -1 for none; counts them as seen."""
        raise NotImplementedError

    def filled(self) -> Tensor:
        """The places that are taken, ascending, on the CPU."""
        raise NotImplementedError

    def counters(self) -> Any:
        """What `places` has counted, to be saved."""
        raise NotImplementedError

    def load_counters(self, counters: Any) -> None:
        """Takes back what `counters` gave."""
        raise NotImplementedError

    def __len__(self) -> int:
        """The number of samples in it."""
        return len(self.filled())

    @torch.no_grad()
    def add(self, raw: Tensor, labels: Tensor, task_ids: Tensor, logits: Tensor | None = None) -> None:
        """Offers the samples of a batch, in their order."""
        places = self.places(labels, task_ids).tolist()
        items = {place: item for item, place in enumerate(places) if place >= 0}  # of several, the last
        incoming = Items(raw, labels, task_ids, logits)._asdict()
        if not items:
            return
        where = torch.tensor(list(items), device=raw.device)
        which = torch.tensor(list(items.values()), device=raw.device)
        for name, values in incoming.items():
            if values is None:
                continue
            if name not in self._stored:
                self._stored[name] = values.new_zeros((self.size, *values.shape[1:]))
            self._stored[name] = self._stored[name].to(values.device)
            self._stored[name].index_copy_(0, where, values.detach().index_select(0, which))

    def draw(self, count: int) -> Items:
        """min(count, stored) distinct samples, each choice as likely as any other; the buffer must not be empty."""
        filled = self.filled()
        chosen = filled[torch.randperm(len(filled), generator=self.generator)[:count]]
        return Items(**{name: t.index_select(0, chosen.to(t.device)) for name, t in self._stored.items()})

    def state_dict(self) -> dict[str, Any]:
        filled = self.filled()
        return {
            "kind": type(self).__name__,
            "size": self.size,
            "counters": self.counters(),
            "generator": self.generator.get_state(),
            "filled": filled,
            "stored": {name: t.index_select(0, filled.to(t.device)) for name, t in self._stored.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError where the state is that of another kind of buffer or another size."""
        saved, here = (state["kind"], state["size"]), (type(self).__name__, self.size)
        if saved != here:
            raise ValueError(
                f"the checkpoint's buffer is a {saved[0]} of {saved[1]} samples per process, this run's a {here[0]} of "
                f"{here[1]}: keep learner.buffer, learner.buffer_size and the number of processes, or start a new run"
            )
        self.load_counters(state["counters"])
        self.generator.set_state(state["generator"].cpu())
        self._stored = {}
        for name, values in state["stored"].items():
            self._stored[name] = values.new_zeros((self.size, *values.shape[1:]))
            self._stored[name].index_copy_(0, state["filled"].to(values.device), values)


class Reservoir(Buffer):
    """A uniform sample of all that came by (Vitter 1985), whatever its length: every item is kept with size / seen.

    Sample number n, from 0, takes place n while n < size; then r is drawn uniformly from {0, …, n}, and it takes place
    r if r < size, else none.
    """

    def __init__(self, size: int, stream: Stream):
        super().__init__(size, stream)
        warn_if_few(self.size, stream.classes, "classes", stream)
        self.seen = 0

    def places(self, labels: Tensor, task_ids: Tensor) -> Tensor:
        places = torch.arange(self.seen, self.seen + len(labels))
        later = places >= self.size
        # 63 random bits modulo n + 1: no value is likelier than another by more than a part in 2⁶³ / n.
        bits = torch.randint(2**63 - 1, (int(later.sum()),), generator=self.generator)
        places[later] = bits % (places[later] + 1)
        self.seen += len(labels)
        return places.where(places < self.size, -1)

    def filled(self) -> Tensor:
        return torch.arange(min(self.seen, self.size))

    def counters(self) -> int:
        return self.seen

    def load_counters(self, counters: int) -> None:
        self.seen = counters


class Ring(Buffer):
    """The last samples of every class, first in first out (Chaudhry et al. 2019, arXiv:1902.10486).

    The places are shared out evenly among the pairs of a task and a class of it, so that where tasks have the same
    classes each keeps its own; shares differ by at most one place. Kept for a class is the last it has shown, not a
    sample of it. Pairs without a place (there are more than places) are not kept.
    """

    def __init__(self, size: int, stream: Stream):
        super().__init__(size, stream)
        pairs = [(task, label) for task, classes in enumerate(stream.classes_of) for label in classes]
        if stream.world > 1 and self.size < len(pairs):  # all ranks would leave out the same ones
            raise ValueError(
                f"learner.buffer=ring needs a place for each of the {len(pairs)} pairs of a task and a class on each "
                f"of the {stream.world} processes; got {self.size}. Raise learner.buffer_size, or try "
                "learner.buffer=reservoir"
            )
        warn_if_few(self.size, len(pairs), "pairs of a task and a class", stream)
        self.pair = torch.full((stream.tasks, stream.classes), -1)
        for number, place in enumerate(pairs):
            self.pair[place] = number
        edges = torch.arange(len(pairs) + 1) * self.size // len(pairs)
        self.first, self.share = edges[:-1], edges.diff()
        self.seen = torch.zeros(len(pairs), dtype=torch.int64)

    def places(self, labels: Tensor, task_ids: Tensor) -> Tensor:
        pair = self.pair[task_ids.cpu(), labels.cpu()]
        if (pair < 0).any():
            raise ValueError("learner.buffer=ring met a label that its task has not. Try learner.buffer=reservoir")
        before = (pair.unsqueeze(1) == pair).tril(-1).sum(1)  # how many of the same pair come earlier in the batch
        number, share = self.seen[pair] + before, self.share[pair]
        self.seen += pair.bincount(minlength=len(self.seen))
        return torch.where(share > 0, self.first[pair] + number % share.clamp(min=1), -1)

    def filled(self) -> Tensor:
        taken = torch.minimum(self.seen, self.share)
        within = torch.arange(self.size) - self.first.repeat_interleave(self.share)
        return (within < taken.repeat_interleave(self.share)).nonzero().flatten()

    def counters(self) -> Tensor:
        return self.seen.clone()

    def load_counters(self, counters: Tensor) -> None:
        if len(counters) != len(self.seen):
            raise ValueError(
                f"the checkpoint's buffer is shared out among {len(counters)} pairs of a task and a class, this run's "
                f"among {len(self.seen)}: keep data.tasks and its classes, or start a new run"
            )
        self.seen = counters.cpu().clone()


def seed_of(seed: int, rank: int) -> int:
    """A seed of its own for every rank of every run."""
    return int.from_bytes(blake2b(f"buffer {seed} {rank}".encode(), digest_size=8).digest(), "big") >> 1


def warn_if_few(size: int, needed: int, what: str, stream: Stream) -> None:
    if size < needed and stream.rank == 0:
        warnings.warn(
            f"learner.buffer_size leaves {size} places on each process, fewer than the {needed} {what} of the stream, "
            "so some of them cannot be replayed. Raise it",
            stacklevel=3,
        )
