"""Convolutions with standardized kernels: weight standardization (Qiao et al. 2019, arXiv:1903.10520), also scaled.

The stored weight is an ordinary one, under its ordinary name; each forward standardizes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DENOMINATORS = {  # of W - mean(W); var over a filter's fan-in, unbiased or (b) divided by the count
    "bcn": "sqrt(var + eps)",
    "readme": "sqrt(var) + eps",
    "bit": "sqrt(var_b + eps)",
}


class StandardizedConv2d(nn.Conv2d):
    """conv(x; Wh) + b, Wh = (W - mean(W)) / denominator, per output filter over its fan-in F = C_in/groups · kh · kw.

    form: which of DENOMINATORS; bcn and readme are the authors' (eps 1e-5), bit that of Big Transfer (eps 1e-6).
    The gradient goes through the standardization, so that of a filter has mean zero and is orthogonal to its centred
    weights. Output is blind to W -> a W + b per filter, a > 0, up to eps. Makes group norm train as well as batch norm
    on one image per device. Only for convolutions that a norm follows, and a fan-in of at least 2 (ValueError):
    one number is its own mean. No state; at least float32 inside.
    """

    form, eps = "bcn", 1e-5

    def standardized(self) -> Tensor:
        """Wh, in the shape and dtype of the weight."""
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).flatten(1)
        var, mean = torch.var_mean(w, 1, correction=int(self.form != "bit"), keepdim=True)
        scale = 1 / (var.sqrt() + self.eps) if self.form == "readme" else (var + self.eps).rsqrt()
        return self.scaled((w - mean) * scale).view_as(self.weight).to(self.weight.dtype)

    def scaled(self, w: Tensor) -> Tensor:
        """(C_out, F) -> same."""
        return w

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardized(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, form={self.form}, eps={self.eps:g}"


class ScaledStandardizedConv2d(StandardizedConv2d):
    """conv(x; gain · gamma/sqrt(F) · Wh) + b: the scaled weight standardization of NF-Nets (Brock et al. 2021).

    gain: (C_out, 1, 1, 1), learned, starts at 1. gamma: a constant that makes up for the activation before, so that
    variance 1 in is variance 1 out: 1 for none, 1.7139588594436646 for ReLU. It takes the place of norm layers.
    """

    gamma = 1.0
    gain: nn.Parameter

    def scaled(self, w: Tensor) -> Tensor:
        return w * (self.gain.to(w.dtype).flatten(1) * (self.gamma * w.shape[1] ** -0.5))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma:g}"
