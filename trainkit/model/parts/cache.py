"""Keys and values of the tokens that a decoder has read, so that the next token does not need them computed again."""

from __future__ import annotations

from torch import Tensor, nn


class Cache:
    """What a decoder remembers of the text that it reads: `length` tokens, at most `context`.

    `with cache:` each call of the model reads on where the last one ended, at positions `length` and up, and its
    logits are those of a call with all tokens at once. Only where every part but attention treats tokens one by one,
    in eval mode: a norm over the positions of a text would need those that are gone. Modules that take part have a
    class attribute `cache`, None outside of the context; the model itself calls `advance` when it has read.
    """

    def __init__(self, model: nn.Module, context: int):
        self.context, self.length = context, 0
        self._parts = [module for module in model.modules() if hasattr(type(module), "cache")]
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> None:
        for part in self._parts:
            part.cache = self  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        for part in self._parts:
            part.cache = None  # type: ignore[assignment]

    def extend(self, sublayer: nn.Module, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the keys and values of T new tokens at a sublayer; returns those of all length + T tokens there.

        k, v: (B, kv_heads, T, head_dim) -> (B, kv_heads, length + T, head_dim), views of the memory.
        """
        if sublayer not in self._kept:
            batch, heads, _, head_dim = k.shape
            self._kept[sublayer] = (
                k.new_empty(batch, heads, self.context, head_dim),
                v.new_empty(batch, heads, self.context, head_dim),
            )
        keys, values = self._kept[sublayer]
        end = self.length + k.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def forget(self) -> None:
        """The next token is the first one again."""
        self.length = 0
