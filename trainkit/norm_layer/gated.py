"""GatedNorm, an RMSNorm that gates itself (Qiu et al. 2026, arXiv:2601.22966)."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.rowwise import RowNorm, at_least_float32, full_precision, mean_square, rms_gradient


class GatedNorm(RowNorm):
    """y = z · sigmoid(silu(z down) up), z = gain · x / sqrt(mean(x²) + eps); down: (width, rank), up: (rank, width).

    The gate rescales rows and channels, so attention sinks need no massive activations (2B model: largest activation
    430 against 2800, loss 1.951 against 1.957) for about 2 % more parameters and 3 to 5 % more time. The paper does
    not say how the matrices start. Here down is N(0, 1/width), so that z down has unit variance, and up is zero: the
    layer starts as half an RMSNorm, the same for every input, and up learns from the first step. Raises ValueError on
    a rank below 1. No official code exists.
    """

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-6, rank: int = 16):
        super().__init__(width, axis=axis, eps=eps)
        if rank < 1:
            raise ValueError(f"norm_layer.rank is the inner width of the gate, at least 1; got {rank}. Try 16")
        self.rank = rank
        self.gain = nn.Parameter(torch.ones(width))
        self.down = nn.Parameter(torch.randn(width, rank) / width**0.5)
        self.up = nn.Parameter(torch.zeros(rank, width))

    def forward(self, x: Tensor) -> Tensor:
        parameters = self.gain, self.down, self.up
        if torch.compiler.is_compiling():
            return self.back(GateKept.apply(self, self.rows(x), *parameters))
        return self.by_rows(x, *parameters)

    def formula(self, x: Tensor, gain: Tensor, down: Tensor, up: Tensor) -> Tensor:
        z = x * (mean_square(x) + self.eps).rsqrt() * gain
        return z * self._gate(z @ down, up)

    def gradient(self, x: Tensor, gy: Tensor, gain: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        r = (mean_square(x) + self.eps).rsqrt()
        z = (x * r).mul_(gain)
        hidden = z @ down
        return self.through(x, gy, z, r, hidden, self._gate(hidden, up), gain, down, up)

    def through(self, x, gy, z, r, hidden, gate, gain, down, up) -> tuple[Tensor, ...]:
        """`gradient`, given what the forward has; may overwrite gate."""
        slope = hidden.sigmoid()
        active = hidden * slope
        glogit = (gy * z).mul_(torch.addcmul(gate, gate, gate, value=-1))  # sigmoid' = gate - gate²
        ghidden = (glogit @ up.T) * (slope + active * (1 - slope))
        if torch.compiler.is_compiling():  # the sum is fused with what follows, but not into a matrix product
            gz = gate * gy + ghidden @ down.T
        else:
            gz = gate.mul_(gy).addmm_(ghidden, down.T)
        gx, ggain = rms_gradient(x, gz, r, gain)
        return gx, ggain, z.T @ ghidden, active.T @ glogit

    @staticmethod
    def _gate(hidden: Tensor, up: Tensor) -> Tensor:
        return (hidden * hidden.sigmoid() @ up).sigmoid()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"


class GateKept(torch.autograd.Function):
    """A GatedNorm for compilers: x and the gate are kept, one tensor more than LayerNorm keeps.

    Left to themselves they keep the results of all matrix products and what these were made of, several times the size
    of x; recomputing those would take half of the time again.
    """

    @staticmethod
    def forward(ctx, norm: GatedNorm, x: Tensor, *parameters: Tensor) -> Tensor:  # type: ignore[override]
        dtype = at_least_float32(x)
        gain, down, up = (p.to(dtype) for p in parameters)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        with full_precision(x):
            r = (mean_square(rows) + norm.eps).rsqrt()
            z = rows * r * gain
            hidden = z @ down
            gate = norm._gate(hidden, up).to(x.dtype)
        ctx.norm = norm
        ctx.save_for_backward(x, *parameters, r, hidden, gate)
        return (z * gate).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, gy: Tensor):  # type: ignore[override]
        x, *parameters, r, hidden, gate = ctx.saved_tensors
        dtype = r.dtype
        gain, down, up = (p.to(dtype) for p in parameters)
        rows, gy_rows = (t.reshape(-1, t.shape[-1]).to(dtype) for t in (x, gy))
        z = rows * gain * r  # in another order than in the forward: a compiler would take that one, and so keep it
        with full_precision(x):
            gx, *rest = ctx.norm.through(rows, gy_rows, z, r, hidden, gate.to(dtype), gain, down, up)
        gradients = (g.to(p.dtype) for g, p in zip(rest, parameters, strict=True))
        return None, gx.to(x.dtype).view(x.shape), *gradients
