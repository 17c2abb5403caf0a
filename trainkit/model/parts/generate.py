"""Text from a decoder, token by token: what it reads, and how the next token is drawn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from trainkit.model.parts.cache import Cache

PROBE = 8  # tokens that are read one by one and at once, to see whether the two agree
TOLERANCE = 1e-3  # of the largest logit: rounding in half precision, far below what a norm over positions changes


class Reader:
    """The logits that follow a growing text: read(tokens (B, T)) -> (B, vocab), each call with the tokens to add.

    With `cached`, keys and values are kept and a call costs the new tokens alone; else all of the text is read again.
    Where the text no longer fits the model's context, reading starts anew with the last context // 2 tokens (one at
    least) at position 0, as if the text began there: once in half a context, the rest stays cheap.
    The model must be in eval mode. `reads`: the tokens that the last logits depend on.
    """

    def __init__(self, model: nn.Module, context: int, *, cached: bool):
        self.model, self.context = model, context
        self.cache = Cache(model, context) if cached else None
        self.reads = torch.empty(0, 0, dtype=torch.int64)

    @torch.inference_mode()
    def read(self, tokens: Tensor) -> Tensor:
        before = self.reads.shape[1]
        self.reads = torch.cat([self.reads, tokens], 1) if before else tokens
        if self.reads.shape[1] > self.context:
            self.reads, before = self.reads[:, -max(1, self.context // 2) :], 0
            if self.cache is not None:
                self.cache.forget()
        if self.cache is None:
            return self.model(self.reads)[:, -1]
        with self.cache:
            return self.model(self.reads[:, before:])[:, -1]


def looking(model: nn.Module) -> list[str]:
    """The names of the norm layers whose output at a position depends on later positions in eval mode too."""
    return sorted({type(module).__name__ for module in model.modules() if getattr(module, "leaks_in_eval", False)})


@torch.inference_mode()
def reads_alike(model: nn.Module, tokens: Tensor, context: int) -> bool:
    """Whether the model gives the logits of `tokens` (B, T), T <= context, also when it reads them one by one.

    It does not where a norm averages over the positions of a text, in eval mode too, which norm_layer=instance and its
    like say themselves (`looking`); the tokens are for models and norms of the user's own.
    """
    if looking(model):
        return False
    cache, whole = Cache(model, context), model(tokens)
    with cache:
        parts = torch.cat([model(column) for column in tokens.split(1, 1)], 1)
    return bool((parts - whole).abs().max() <= TOLERANCE * whole.abs().max())


def draw(logits: Tensor, generator: torch.Generator, *, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """A token per row, (B, vocab) -> (B,), from softmax(logits / temperature); temperature 0: the likeliest one.

    top_k: among the k likeliest alone. top_p: of those, among the fewest likeliest that have this share of their
    probability (nucleus sampling, Holtzman et al. 2020, arXiv:1904.09751). The generator is on the CPU, so that a seed
    means the same on every device. Raises ValueError for logits that are not numbers.
    """
    logits = logits.to("cpu", torch.float64)
    if logits.isnan().any() or (logits == torch.inf).any():
        raise ValueError("the model's logits are not finite, so there is nothing to draw: its training has diverged")
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = logits.sort(dim=-1, descending=True, stable=True)
    # The largest is subtracted first: a tiny temperature then gives 0 and -inf, and not inf - inf.
    p = ((logits - logits[:, :1]) / temperature).softmax(-1)[:, :top_k]
    before = p.cumsum(-1) - p
    p = torch.where(before < top_p * p.sum(-1, keepdim=True), p, 0.0)
    return order.gather(-1, torch.multinomial(p, 1, generator=generator)).squeeze(-1)


def tokens_after(
    read: Reader, prompt: Tensor, generator: torch.Generator, *, temperature: float, top_k: int | None, top_p: float
) -> Iterator[int]:
    """The tokens that the model adds to a prompt (1, T), T > 0, one after the other and without end."""
    tokens = prompt
    while True:
        logits = read.read(tokens)
        token = draw(logits, generator, temperature=temperature, top_k=top_k, top_p=top_p)
        yield int(token)
        tokens = token.to(prompt.device)[:, None]
