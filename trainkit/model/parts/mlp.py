"""Feed-forward sublayers of transformers."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.model.parts.linear import linear
from trainkit.norm.placement import Placement, Site


class FeedForward(nn.Module):
    """A sublayer of two linear layers, `inp` and `out`, with an activation between them."""

    feeds_activation = ("inp", "hidden_norm")  # the layer, and the norm between it and the activation

    inp: nn.Linear
    out: nn.Linear

    @torch.no_grad()
    def scale_branch(self, *, first: float, last: float) -> None:
        """Multiplies the first weights by `first` and the output weights by `last`, in place."""
        self.inp.weight *= first
        self.out.weight *= last


class MLP(FeedForward):
    """out(gelu(in(x))), x: (…, width) -> same. gelu: "exact", or "tanh", the approximation that GPT-2 was trained with.

    Raises ValueError on another one, and where there are no hidden units.
    """

    def __init__(
        self,
        site: Site,
        norm: Placement,
        *,
        hidden: int,
        bias: bool = False,
        dropout: float = 0.0,
        gelu: str = "exact",
        std: float = 0.02,
        out_std: float = 0.02,
    ):
        super().__init__()
        if gelu not in ("exact", "tanh"):
            raise ValueError(f"model.gelu is exact or tanh; got {gelu!r}")
        if hidden < 1:
            raise ValueError(f"model.hidden must be at least 1; got {hidden}")
        self.dropout, self.approximate = dropout, "tanh" if gelu == "tanh" else "none"
        self.inp = linear(site.width, hidden, bias=bias, std=std)
        self.hidden_norm = norm.inside(replace(site, kind="hidden", width=hidden))
        self.last_norm = norm.inside(replace(site, kind="last", width=hidden))
        self.out = linear(hidden, site.width, bias=bias, std=out_std, writes_stream=True)

    def forward(self, x: Tensor) -> Tensor:
        u = F.gelu(self.hidden_norm(self.inp(x)), approximate=self.approximate)
        y = self.out(self.last_norm(u))
        return F.dropout(y, self.dropout, self.training)


class SwiGLU(FeedForward):
    """out(silu(gate) · up), (gate, up) = split(inp(x)); x: (…, width) -> same (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(
        self,
        site: Site,
        norm: Placement,
        *,
        hidden: int,
        bias: bool = False,
        dropout: float = 0.0,
        std: float = 0.02,
        out_std: float = 0.02,
    ):
        super().__init__()
        self.dropout = dropout
        self.inp = linear(site.width, 2 * hidden, bias=bias, std=std)
        self.hidden_norm = norm.inside(replace(site, kind="hidden", width=2 * hidden))
        self.last_norm = norm.inside(replace(site, kind="last", width=hidden))
        self.out = linear(hidden, site.width, bias=bias, std=out_std, writes_stream=True)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.hidden_norm(self.inp(x)).chunk(2, dim=-1)
        y = self.out(self.last_norm(F.silu(gate) * up))
        return F.dropout(y, self.dropout, self.training)
