"""mHC-lite (Yang & Gao 2026, arXiv:2601.05732): several residual streams, mixed by doubly stochastic matrices."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import permutations
from math import factorial, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm.placement import Placement, Site


class Hyper(Placement):
    """S copies of the residual stream; every sublayer reads a weighted sum, mixes the copies and writes to all of them.

    x_s = embedding, s = 1 … S; per sublayer, from the token's own streams:
        x'_t = sum_s H[s, t] x_s + q_t f(N(sum_s p_s x_s)),   H = sum_r w_r P_r over the S! permutation matrices
    and in the end y = N(sum_s x_s). As a mean of permutations H is doubly stochastic by construction, so mixing keeps
    the sum of the streams and cannot grow (mHC reaches that approximately, by 20 Sinkhorn iterations). It costs S times
    the stream's memory and S! mixing weights per token: 24 for the paper's S = 4, refused above S = 6.
    Raises ValueError for such S, and where the number of the sublayer, which decides the first weights, is unknown.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, streams: int = 4):
        super().__init__(norm_layer)
        if not 1 <= streams <= 6:
            raise ValueError(
                f"norm.streams must be between 1 and 6 (mixing costs streams! weights per token); got {streams}. Try 4"
            )
        self.streams = streams

    def before(self, site: Site) -> nn.Module:
        return Split(self.streams, site.axis)

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        index = site.located("norm=hyper").index
        return HyperConnection(f, site.width, pre=self.norm(site), streams=self.streams, index=index, axis=site.axis)

    def after(self, site: Site) -> nn.Module:
        return Sum(self.norm(site), site.axis)


class Split(nn.Module):
    """Features with C channels on `axis` -> streams (…, S, C), all equal."""

    def __init__(self, streams: int, axis: int):
        super().__init__()
        self.streams, self.axis = streams, axis

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1).unsqueeze(-2)
        return x.expand(*x.shape[:-2], self.streams, x.shape[-1])

    def extra_repr(self) -> str:
        return f"streams={self.streams}"


class Sum(nn.Module):
    """Streams (…, S, C) -> norm(sum over S), channels on `axis`."""

    def __init__(self, norm: nn.Module, axis: int):
        super().__init__()
        self.norm, self.axis = norm, axis

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.sum(-2).movedim(-1, self.axis))


class HyperConnection(nn.Module):
    """Streams (…, S, C) -> same, around one sublayer.

    n = sqrt(S C) · v / ‖v‖ · (1 + gain), v: (…, S C) the streams side by side. Of the weights,
        p = sigmoid(read_scale · (n A)[:S] + b[:S])         (S)    reading,    A: (S C, S + S!) `read_mix`, starts at 0
        w = softmax(mix_scale · (n A)[S:] + b[S:])          (S!)   mixing,     b: (S + S!) `read_mix_bias`
        q = 2 sigmoid(write_scale · n B + c)                (S)    writing,    B: (S C, S) `write`, c: (S) `write_bias`
    The three scales start at 0.01; the biases start so that sublayer `index` reads and writes mostly stream
    index mod S (+1, the others -1) and the mixing is nearly the identity (0, the other permutations -8).
    """

    permutations: Tensor

    def __init__(
        self,
        f: nn.Module,
        width: int,
        *,
        pre: nn.Module | None = None,
        streams: int = 4,
        index: int = 0,
        axis: int = -1,
    ):
        super().__init__()
        self.pre, self.f = pre, f
        self.streams, self.index, self.axis = streams, index, axis
        mixings = factorial(streams)
        self.gain = nn.Parameter(torch.zeros(streams * width))
        self.read_mix = nn.Parameter(torch.zeros(streams * width, streams + mixings))
        self.write = nn.Parameter(torch.zeros(streams * width, streams))
        self.read_scale, self.mix_scale, self.write_scale = (nn.Parameter(torch.full((1,), 0.01)) for _ in range(3))

        favourite = torch.full((streams,), -1.0)
        favourite[index % streams] = 1.0
        mixing = torch.full((mixings,), -8.0)
        mixing[0] = 0.0
        self.read_mix_bias = nn.Parameter(torch.cat([favourite, mixing]))
        self.write_bias = nn.Parameter(favourite.clone())
        # Row r is the matrix with a one at (i, perm_r(i)), flattened; the identity comes first.
        orders = torch.tensor(list(permutations(range(streams))))
        matrices = F.one_hot(orders, streams).flatten(-2).to(torch.get_default_dtype())
        self.register_buffer("permutations", matrices, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h, mixed, write = self.route(x)
        u = self.f(h if self.pre is None else self.pre(h)).movedim(self.axis, -1)
        return mixed + write.unsqueeze(-1) * u.unsqueeze(-2)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The branch's input with its channels on `axis`, the mixed streams (…, S, C) and the write weights (…, S)."""
        kind = x.device.type
        # Autocast would round the residual streams to half precision in every product.
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            read, mixing, write = self.weights(x)
            h = (read.unsqueeze(-2) @ x).squeeze(-2).movedim(-1, self.axis)
            return h, mixing.mT @ x, write

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """p: (…, S), H: (…, S, S), q: (…, S) in the dtype of x, computed in at least float32."""
        v = x.flatten(-2)
        wide = torch.promote_types(x.dtype, torch.float32)
        n = F.normalize(v.to(wide), dim=-1) * (sqrt(v.shape[-1]) * (1 + self.gain.to(wide)))
        read, mix = (n @ self.read_mix.to(wide)).split([self.streams, self.permutations.shape[0]], dim=-1)
        read_bias, mix_bias = self.read_mix_bias.to(wide).split([self.streams, self.permutations.shape[0]])
        p = torch.sigmoid(self.read_scale * read + read_bias)
        w = torch.softmax(self.mix_scale * mix + mix_bias, dim=-1)
        q = 2 * torch.sigmoid(self.write_scale * (n @ self.write.to(wide)) + self.write_bias)
        h = (w @ self.permutations.to(wide)).unflatten(-1, (self.streams, self.streams))
        return p.to(x.dtype), h.to(x.dtype), q.to(x.dtype)

    def extra_repr(self) -> str:
        return f"streams={self.streams}, index={self.index}"
