"""A GPT and its training step in plain PyTorch, as nanoGPT has them: what `bench train` compares with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from math import cos, pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = CausalSelfAttention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class NanoGPT(nn.Module):
    """(tokens, targets), both int64 (B, T) -> the mean cross-entropy, 0-d.

    Linear layers without biases, no dropout, the head tied to the embedding.
    """

    def __init__(self, vocab: int, *, depth: int, width: int, heads: int, context: int):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                out = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / sqrt(2 * depth) if out else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Loop:
    """One optimizer step per call: fused AdamW on matrices and vectors, clipping at 1, a cosine set by hand.

    autocast: bfloat16 for the forward, None: float32; compile: by torch.compile.
    """

    def __init__(
        self,
        model: NanoGPT,
        batches: Iterator[Any],
        *,
        lr: float = 6e-4,
        warmup: int = 100,
        total: int = 2000,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ):
        self.model, self.batches, self.lr, self.warmup, self.total = model, batches, lr, warmup, total
        self.device = next(model.parameters()).device
        self.call = torch.compile(model) if compile else model
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)
        self.forward = torch.autocast(self.device.type, autocast) if autocast else nullcontext()
        self.steps = 0

    def __call__(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * self.factor()
        tokens, targets = (part.to(self.device, non_blocking=True) for part in next(self.batches))
        with self.forward:
            loss = self.call(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def factor(self) -> float:
        """A linear warm-up, then half a cosine down to a tenth."""
        if self.steps < self.warmup:
            return (self.steps + 1) / (self.warmup + 1)
        done = min(1.0, (self.steps - self.warmup) / (self.total - self.warmup))
        return 0.1 + 0.45 * (1 + cos(pi * done))
