"""Everything that the activations of a network tell, on given batches: `look(task, batches)`.

The names, with blocks.3 for the output of block 3 and embed for what the first block reads (measure/blocks.py says what
that is where several streams flow):

    hidden_variance, hidden_mean_square, hidden_max     per token over channels; max |h| of all
    massive_ratio, massive_count                        max |h| over the median |h|; massive activations per token
    residual_sink                                       share of |h| in the top 1 % of channels; /all over all layers
    hidden_rank, hidden_nuclear_norm                    of the matrix (tokens, channels), not centred
    angular_distance, block_influence                   of a block's output from its input
    deletion_drop                                       what the loss rises by without the block, in nats
    attention_entropy, attention_entropy_min            nats, mean over heads and the smallest head
    attention_sink, attention_logit                     weight on the first position; largest |q kᵀ| / sqrt(D)
    logit_rms, logit_max                                of the network's output

The definitions are those of measure/representation.py, plasticity.py and attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trainkit.measure.attention import (
    Attending,
    attention_entropy,
    attention_logits,
    attention_sink,
    largest_logit,
)
from trainkit.measure.blocks import Recording, without
from trainkit.measure.modes import evaluating
from trainkit.measure.plasticity import effective_rank_of, nuclear_norm_of, rows, singular_values
from trainkit.measure.representation import (
    angular_distances,
    block_influence,
    channel_variance,
    massive,
    max_abs,
    mean_square,
    median_abs,
    residual_sinks,
    sink_share,
)

SEQUENCES = 4  # of each batch, whose attention weights are made: heads · T² numbers each, one sequence at a time
SVD_ROWS = 1024  # tokens of the probe whose rank is taken


@dataclass
class Seen:
    """Numbers by name, 0-d: `means` are means over the batches, `maxima` the largest of all.

    distances: (L, L), the angular distances between all pairs of hidden states, in the order of `layers`; None where
    there are none. left_out: what could not be measured in this network, and why, for people.
    """

    means: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)
    distances: Tensor | None = None
    layers: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def look(task: Any, batches: Sequence[Any], *, tokens: str = "all", deletion: bool = True) -> dict[str, float]:
    """The measures above, by name, of task.model on the batches, which lie on its device, in eval mode.

    task: anything with a `model` and a `loss(model, batch)`. tokens: angular distances over "all" tokens or the "last"
    of each sequence; deletion: whether each block is left out once, which takes a forward pass per block.
    """
    seen = inspect(task, batches, tokens=tokens, deletion=deletion)
    found = seen.means | seen.maxima
    if not found:
        return {}
    return dict(zip(found, torch.stack([value.double().cpu() for value in found.values()]).tolist(), strict=True))


@torch.no_grad()
def inspect(
    task: Any,
    batches: Sequence[Any],
    *,
    tokens: str = "all",
    deletion: bool = True,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Seen:
    """`look` without fetching the numbers from the device; `context` is entered around the forward passes (autocast).

    Draws no random numbers beyond those of a forward pass in eval mode, and leaves parameters, buffers and modes as
    they were.
    """
    if not batches:
        raise ValueError("there is nothing to look at: give at least one batch")
    sums = _Sums(batches=len(batches), tokens=tokens)
    model = task.model
    recording, attending = Recording(model), Attending(model, sums.attention)
    with evaluating(model), context():
        losses = []
        logits = model.register_forward_hook(lambda *args: sums.logits(args[-1]))
        try:
            with recording, attending:
                for batch in batches:
                    losses.append(task.loss(model, batch))
                    sums.hidden(recording.states)
        finally:
            logits.remove()
        seen = sums.seen()
        if not recording.blocks:
            seen.left_out.append("the model has no `blocks`, so nothing is measured by block")
        if deletion and recording.alike:
            whole = torch.stack(losses).mean()
            for name in recording.alike:
                with without(recording.blocks[name]):
                    rest = torch.stack([task.loss(model, batch) for batch in batches]).mean()
                seen.means[f"deletion_drop/{name}"] = rest - whole
    changing = [name for name in recording.blocks if name not in recording.alike]
    if changing:
        seen.left_out.append(
            f"{', '.join(changing)} change the shape of the hidden states, so layers are not compared by direction "
            "there and such a block is not left out"
        )
    return seen


class _Sums:
    """What has been seen so far; each batch counts alike."""

    def __init__(self, *, batches: int, tokens: str):
        self.batches, self.tokens = batches, tokens
        self.means: dict[str, Tensor] = {}
        self.maxima: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}  # mean |h| of each channel
        self.rows: dict[str, list[Tensor]] = {}
        self.distances: Tensor | None = None

    def hidden(self, states: dict[str, Tensor]) -> None:
        for name, h in states.items():
            largest, median = max_abs(h), median_abs(h)
            self._mean(f"hidden_variance/{name}", channel_variance(h))
            self._mean(f"hidden_mean_square/{name}", mean_square(h))
            self._mean(f"massive_count/{name}", massive(h) / (h.shape[0] * h.shape[1]))
            self._max(f"hidden_max/{name}", largest)
            self._max(f"massive_ratio/{name}", largest / median)
            means, order = residual_sinks(h)
            by_channel = torch.empty_like(means).scatter_(0, order, means)
            self.channels[name] = self.channels.get(name, 0.0) + by_channel / self.batches
            self.rows.setdefault(name, []).append(rows(h, -1, -(-SVD_ROWS // self.batches)))
        for before, after in pairwise(states):
            if states[before].shape == states[after].shape:
                pair = torch.stack((states[before], states[after]))
                self._mean(f"block_influence/{after}", block_influence(pair)[0])
        if len({h.shape for h in states.values()}) == 1 and len(states) > 1:
            found = angular_distances(torch.stack(list(states.values())), tokens=self.tokens) / self.batches
            self.distances = found if self.distances is None else self.distances + found

    def attention(self, name: str, q: Tensor, k: Tensor, causal: bool) -> None:
        entropies, sinks, logits = [], [], []
        for one in range(min(len(q), SEQUENCES)):
            found = attention_logits(q[one : one + 1], k[one : one + 1], causal=causal)
            weights = found.softmax(-1)
            entropies.append(attention_entropy(weights))
            sinks.append(attention_sink(weights))
            logits.append(largest_logit(found))
        entropy, label = torch.stack(entropies).mean(0), _block_of(name)
        self._mean(f"attention_entropy/{label}", entropy.mean())
        self._mean(f"attention_entropy_min/{label}", entropy.min())
        self._mean(f"attention_sink/{label}", torch.stack(sinks).mean())
        self._max(f"attention_logit/{label}", torch.stack(logits).max())

    def logits(self, output: Any) -> None:
        if isinstance(output, Tensor):
            z = output.detach().to(torch.promote_types(output.dtype, torch.float32))
            self._mean("logit_rms", z.square().mean().sqrt())
            self._max("logit_max", z.abs().max())

    def seen(self) -> Seen:
        layers = list(self.channels)
        for name, magnitudes in self.channels.items():
            self.means[f"residual_sink/{name}"] = sink_share(magnitudes)
        if len({len(m) for m in self.channels.values()}) == 1:
            self.means["residual_sink/all"] = sink_share(torch.stack(list(self.channels.values())).mean(0))
        for name, found in self.rows.items():
            features = torch.cat(found)
            values = singular_values(features)
            self.means[f"hidden_rank/{name}"] = effective_rank_of(values)
            self.means[f"hidden_nuclear_norm/{name}"] = nuclear_norm_of(values, len(features))
        if self.distances is not None:
            for i, name in enumerate(layers[1:]):
                self.means[f"angular_distance/{name}"] = self.distances[i, i + 1]
        return Seen(self.means, self.maxima, self.distances, layers)

    def _mean(self, name: str, value: Tensor) -> None:
        self.means[name] = self.means.get(name, 0.0) + value / self.batches

    def _max(self, name: str, value: Tensor) -> None:
        self.maxima[name] = torch.maximum(self.maxima[name], value) if name in self.maxima else value


def _block_of(name: str) -> str:
    """The block that a module lies in: blocks.3 of blocks.3.attn.f; a module outside of blocks goes by its name."""
    parts = name.split(".")
    place = parts.index("blocks") if "blocks" in parts else len(parts)
    return ".".join(parts[place : place + 2]) or name
