"""Batch normalization in the Poincaré ball, by midpoints (van Spengler, Berkhout & Mettes, ICCV 2023)."""

from __future__ import annotations

from math import expm1, log

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TINY = 1e-15


class PoincareBatchNorm(nn.Module):
    """y = log_0(exp_p(sqrt(var/(v + eps)) · PT_{m -> p} log_m(exp_0(x)))), p = exp_0(mean).

    x, y: tangent vectors at the origin of a ball of curvature -c, c = softplus(curvature), `width` on the last axis;
    all other axes together are the batch. m: the batch's midpoint, half (in Möbius terms) of sum(l x) / sum(l - 1),
    l = 2/(1 - c |x|²), which has a closed form, unlike the Fréchet mean; v: the mean squared distance to m. mean:
    (width,) and var: scalar, learned, start at 0 and 1. Points are held within 1 - margin of the ball's edge.
    By the batch's statistics in training and in eval, as in the released code, whose running ones are never used.
    Gradients are autograd's, those for the curvature too, where that code's own backward is wrong. float32 at least.
    """

    def __init__(self, width: int, *, c: float = 1.0, eps: float = 1e-6, margin: float = 1e-5):
        super().__init__()
        if width < 1 or c <= 0:
            raise ValueError(f"a Poincaré ball needs a width of at least 1 and a c above 0; got {width} and {c}")
        self.eps, self.margin = eps, margin
        self.mean, self.var = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.ones(()))
        self.curvature = nn.Parameter(torch.tensor(log(expm1(c))))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != len(self.mean) or not x.numel():
            raise ValueError(f"PoincareBatchNorm needs vectors of {len(self.mean)} channels; got {tuple(x.shape)}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        c = F.softplus(self.curvature.to(dtype))
        h = self._inside(exp_0(x.to(dtype).flatten(0, -2), c), c)
        target = self._inside(exp_0(self.mean.to(dtype), c), c)
        middle = midpoint(h, c)
        away = log_at(middle, h, c)
        v = (away.square().sum(-1) * conformal(middle, c).squeeze(-1).square()).mean()  # |log_m(x)| is the distance
        moved = transport(middle, target, away, c) * (self.var.to(dtype) / (v + self.eps)).sqrt()
        return log_0(self._inside(exp_at(target, moved, c), c), c).view(x.shape).to(x.dtype)

    def _inside(self, x: Tensor, c: Tensor) -> Tensor:
        """x, pulled back along its ray where it is within `margin` of the edge."""
        length, limit = norm(x), (1 - self.margin) / c.sqrt()
        return torch.where(length > limit, x / length * limit, x)


def norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=TINY)


def dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def conformal(x: Tensor, c: Tensor) -> Tensor:
    """2/(1 - c |x|²), what lengths at x are multiplied with."""
    return 2 / (1 - c * dot(x, x)).clamp(min=TINY)


def artanh(x: Tensor) -> Tensor:
    return torch.atanh(x.clamp(max=1 - torch.finfo(x.dtype).eps))


def add(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """Möbius addition."""
    xx, yy, xy = dot(x, x), dot(y, y), dot(x, y)
    below = 1 + 2 * c * xy + c.square() * xx * yy
    return ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / below.clamp(min=TINY)


def exp_0(v: Tensor, c: Tensor) -> Tensor:
    length = c.sqrt() * norm(v)
    return torch.tanh(length) / length * v


def log_0(x: Tensor, c: Tensor) -> Tensor:
    length = c.sqrt() * norm(x)
    return artanh(length) / length * x


def exp_at(p: Tensor, v: Tensor, c: Tensor) -> Tensor:
    length = c.sqrt() * norm(v)
    return add(p, torch.tanh(conformal(p, c) * length / 2) / length * v, c)


def log_at(p: Tensor, x: Tensor, c: Tensor) -> Tensor:
    gap = add(-p, x, c)
    length = c.sqrt() * norm(gap)
    return 2 / conformal(p, c) * artanh(length) / length * gap


def transport(p: Tensor, q: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """The tangent vector v at p, carried along the geodesic to q: gyr[q, -p] v · l_p / l_q."""
    uv, uw, vw = dot(q, -p), dot(q, v), dot(-p, v)
    uu, vv = dot(q, q), dot(p, p)
    a = -c.square() * uw * vv + c * vw + 2 * c.square() * uv * vw
    b = -c.square() * vw * uu - c * uw
    turned = v + 2 * (a * q - b * p) / (1 + 2 * c * uv + c.square() * uu * vv).clamp(min=TINY)
    return turned * conformal(p, c) / conformal(q, c)


def midpoint(x: Tensor, c: Tensor) -> Tensor:
    """(N, C) -> (C,): the gyromidpoint."""
    weights = conformal(x, c)
    m = (weights * x).sum(0) / (weights - 1).sum(0).clamp(min=TINY)
    g = (1 - c * dot(m, m)).clamp(min=TINY).rsqrt()
    return m * g / (1 + g)
