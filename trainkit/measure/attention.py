"""Where attention looks: how evenly, how much at the first position, and how large its logits are.

The weights are recomputed from the queries and keys that the fused product takes, which keeps no weights itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from trainkit.model.parts.attention import Attention


def attention_logits(q: Tensor, k: Tensor, *, causal: bool) -> Tensor:
    """q kᵀ / sqrt(D), -inf where a causal query may not look: (B, heads, T, T), in at least float32.

    q: (B, heads, T, D); k: (B, kv_heads, T, D), each shared by heads / kv_heads queries.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):  # which would take the product in half precision
        found = q.to(wide) @ k.to(wide).mT / q.shape[-1] ** 0.5
    if causal:
        hidden = torch.ones(found.shape[-2:], dtype=torch.bool, device=found.device).triu(1)
        found = found.masked_fill(hidden, -torch.inf)
    return found


def attention_entropy(weights: Tensor) -> Tensor:
    """-sum_k p_k log p_k in nats, the mean over samples and queries, per head: (heads,).

    weights: (B, heads, T, T), rows that sum to 1. 0 where every query looks at one place, log T where it looks
    everywhere alike. A causal query sees t positions, so its entropy ends at log t, and the mean at (log T!) / T.
    """
    return torch.special.entr(weights).sum(-1).mean((0, 2))


def attention_sink(weights: Tensor) -> Tensor:
    """The weight on the first position, the mean over samples and all queries but the first, per head: (heads,).

    The first is left out, as a causal one has nothing else to look at. NaN for sequences of one position.
    """
    return weights[:, :, 1:, 0].mean((0, 2))


def largest_logit(logits: Tensor) -> Tensor:
    """max |q kᵀ| / sqrt(D) over samples and the pairs that are seen, per head: (heads,)."""
    return logits.masked_fill(logits == -torch.inf, 0).abs().amax((0, 2, 3))


class Attending:
    """A context in which every attention layer hands its queries and keys to `see`, as it multiplies them.

    see(name of the layer, q, k, causal): q: (B, heads, T, D), k: (B, kv_heads, T, D), past norms and rotation.
    """

    def __init__(self, model: nn.Module, see: Callable[[str, Tensor, Tensor, bool], None]):
        self.model, self.see = model, see
        self._queries: dict[str, Tensor] = {}

    def __enter__(self) -> Attending:
        self._hooks = []
        for name, layer in self.model.named_modules():
            if isinstance(layer, Attention):  # the norms after the rotation, or nothing in their place, come last
                self._hooks.append(layer.q_rotated.register_forward_hook(partial(self._query, name)))
                self._hooks.append(layer.k_rotated.register_forward_hook(partial(self._key, name, layer.causal)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _query(self, name: str, module: nn.Module, args: tuple[Tensor, ...], q: Tensor) -> None:
        self._queries[name] = q.detach()

    def _key(self, name: str, causal: bool, module: nn.Module, args: tuple[Tensor, ...], k: Tensor) -> None:
        self.see(name, self._queries.pop(name), k.detach(), causal)
