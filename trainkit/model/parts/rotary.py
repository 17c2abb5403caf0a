"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Turns the pair (x_i, x_{i + D/2}) of every head by the angle t · base^(-2i/D), t the token's position.

    x: (B, heads, T, D), at the positions from `start` -> same. The pairing by halves is that of the LLaMA weights on
    the hub. The tables are computed once, in float64, and follow the module's dtype and device; they are not part of
    the state.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context: int, *, base: float = 10000.0):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary positions need an even width per head; model.width / model.heads is {head_dim}")
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)  # (context, D/2)
        self._tables = (angle.cos(), angle.sin())
        self.register_buffer("cos", self._tables[0].float(), persistent=False)
        self.register_buffer("sin", self._tables[1].float(), persistent=False)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        # A cast to float64 must not keep the rounding of the float32 tables.
        super()._apply(fn, recurse)
        for name, table in zip(("cos", "sin"), self._tables, strict=True):
            buffer = getattr(self, name)
            if buffer.dtype == torch.float64:
                setattr(self, name, table.to(buffer.device))
        return self

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        end = start + x.shape[-2]
        cos, sin = self.cos[start:end].to(x.dtype), self.sin[start:end].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
