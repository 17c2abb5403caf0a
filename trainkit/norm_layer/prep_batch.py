"""PRepBN (SLAB, Guo et al., ICML 2024, arXiv:2405.11582): from LayerNorm to RepBN while training."""

from __future__ import annotations

import torch
from torch import Tensor

from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.rep_batch import RepBN
from trainkit.norm_layer.rms import RMSNorm
from trainkit.norm_layer.stateful import Stateful


class PRepBN(Stateful):
    """y = lam N1(x) + (1 - lam) N2(x), N1 a LayerNorm (first="layer") or RMSNorm ("rms"), N2 a RepBN.

    lam = 1 in the first `warm` steps, in which N2's statistics stand still; then r0 · left/steps, left counting down
    from `steps` to 0. **Eval is N2 alone at any time**: during the warm-up, with N2's statistics still at 0 and 1, a
    validation says nothing, and before the end of the schedule little. At the end a step costs both norms, inference
    none: N2 folds into the next linear layer. eps is N1's, bn_eps N2's; init, momentum: see RepBN.
    The authors' vision models: the defaults, with 300000 calls (SLAB-DeiT 60000, SLAB-CSwin 120000). Their language
    model: first=rms, init=llama, eps=bn_eps=1e-6, warm=10000, steps=18000, period=16.
    The released code counts calls (count=call); its language model moves the two counters on the first of every
    `period` calls, its number of micro-batches. With count=step no period is needed. Leaks the future in training.
    """

    reads = ("warm", "left")
    warm: Tensor
    left: Tensor
    total: Tensor
    calls: Tensor

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        first: str = "layer",
        eps: float = 1e-5,
        bn_eps: float = 1e-5,
        momentum: float = 0.1,
        init: str = "vision",
        warm: int = 0,
        steps: int = 300000,
        r0: float = 1.0,
        period: int = 1,
        count: str = "step",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        if first not in ("layer", "rms"):
            raise ValueError(f"norm_layer.first is layer or rms; got {first!r}")
        if warm < 0 or steps < 1:
            raise ValueError(f"norm_layer.warm must be at least 0 and norm_layer.steps 1; got {warm} and {steps}")
        if period < 1 or (period > 1 and count == "step"):
            raise ValueError(
                f"norm_layer.period is a number of calls, from 1; got {period} with norm_layer.count={count}. "
                "Under count=step accumulation is seen to; try norm_layer.period=1"
            )
        self.r0, self.period = r0, period
        self.first = (LayerNorm if first == "layer" else RMSNorm)(width, axis=axis, eps=eps)
        self.second = RepBN(width, axis=axis, eps=bn_eps, momentum=momentum, init=init, count=count, sync=sync)
        for name, value in (("warm", warm), ("left", steps), ("total", steps), ("calls", 0)):
            self.register_buffer(name, torch.tensor(value))
        self.expect_statistics(0, width)

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x: `width` channels on `axis`; pad_mask: x's shape without them, True at padding -> y, of x's shape."""
        if not self.training:
            return self.second(x, pad_mask)
        bn = self.second.bn
        normalized, statistics, n = bn.normalize(x, pad_mask)
        warm, left = self.read(statistics[0])
        lam = torch.where(warm > 0, 1.0, self.r0 * left.to(statistics.dtype) / self.total)
        bn.observe(statistics, n * (warm == 0))
        self.observe(statistics[:0], n)
        return lam * self.first(x) + (1 - lam) * self.second.join(x, normalized, pad_mask)

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        """(a, c) of eval's y = a x + c."""
        return self.second.scale_shift()

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        moves = seen & (self.calls == 0)
        mixing = self.warm == 0
        self.left -= (moves & mixing & (self.left > 0)).long()
        self.warm -= (moves & ~mixing).long()
        self.replace("calls", (self.calls + 1) % self.period, seen)

    def extra_repr(self) -> str:
        return f"r0={self.r0}, period={self.period}, count={self.count}"
