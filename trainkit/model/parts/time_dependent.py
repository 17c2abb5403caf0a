"""Time-dependent LayerNorm and RMSNorm of diffusion models (Liu et al. 2024, arXiv:2406.09416)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TimeDependent(nn.Module):
    """p(t) = s · clean + (1 - s) · noisy, s = sigmoid((1 + slope) tau + shift), tau = log SNR / divisor per sample.

    clean, noisy, slope, shift: (width,); they start at `init`, `init`, 0 and 0, so p starts as a constant. Two vectors
    and a switch for each channel, in place of a network from time to gains and biases.
    """

    def __init__(self, width: int, init: float, divisor: float):
        super().__init__()
        self.divisor = divisor
        self.clean, self.noisy = (nn.Parameter(torch.full((width,), init)) for _ in range(2))
        self.slope, self.shift = (nn.Parameter(torch.zeros(width)) for _ in range(2))

    def forward(self, log_snr: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        s = torch.sigmoid((1 + self.slope) * (log_snr / self.divisor).unsqueeze(-1) + self.shift)
        return torch.lerp(self.noisy.expand_as(s), self.clean.expand_as(s), s)


class TimeDependentNorm(nn.Module):
    """y = gain(t) · xh + bias(t), each sample at its own time t; gain, bias: TimeDependent.

    kind="layer": xh = (x - mean)/sqrt(var + eps), var biased. kind="rms": xh = x / (sqrt(mean(x²)) + eps), eps outside
    of the root as in the released code, and no bias. Means are over the channels, which are on the last axis. eps: 1e-5
    and 1e-8 in that code (None). The time is an argument of every call: none is kept. At least float32 inside.
    """

    def __init__(self, width: int, *, kind: str = "layer", eps: float | None = None, divisor: float = 4.0):
        super().__init__()
        if kind not in ("layer", "rms"):
            raise ValueError(f"kind is layer or rms; got {kind!r}")
        if width < 1:
            raise ValueError(f"a norm needs at least 1 channel; got width {width}")
        self.kind = kind
        self.eps = eps if eps is not None else {"layer": 1e-5, "rms": 1e-8}[kind]
        self.gain = TimeDependent(width, 1.0, divisor)
        self.bias = TimeDependent(width, 0.0, divisor) if kind == "layer" else None

    def forward(self, x: Tensor, log_snr: Tensor) -> Tensor:
        """x: (B, …, width), log_snr: (B,) -> shape and dtype of x."""
        if log_snr.shape != x.shape[:1]:
            raise ValueError(
                f"every sample has its own time: log_snr must be of shape {tuple(x.shape[:1])}; got "
                f"{tuple(log_snr.shape)}. Pass one number per sample"
            )
        h, log_snr = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (x, log_snr))
        if self.kind == "layer":
            var, mean = torch.var_mean(h, -1, correction=0, keepdim=True)
            h = (h - mean) * (var + self.eps).rsqrt()
        else:
            h = h / (h.square().mean(-1, keepdim=True).sqrt() + self.eps)
        h = h * self._beside(self.gain(log_snr), x)
        return (h if self.bias is None else h + self._beside(self.bias(log_snr), x)).to(x.dtype)

    @staticmethod
    def _beside(p: Tensor, x: Tensor) -> Tensor:
        """(B, C) -> (B, 1, …, C)."""
        return p.view(len(p), *[1] * (x.dim() - 2), -1)
