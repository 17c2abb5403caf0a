"""Fixup (Zhang, Dauphin & Ma, ICLR 2019, arXiv:1901.09321): initialization and scalars in the place of norms."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trainkit.norm.placement import Placement, Residual, Site, scale_branch


class Fixup(Placement):
    """h <- h + a · f(h + b), scalars a (starts at 1) and b (at 0) per sublayer; no norm.    h ──┬─ +b ─ f ─ a ─ + ──►
                                                                                                └───────────────┘
    At the start the output weights of every sublayer are zero and its value or input weights are multiplied by
    n^(-1/(2m - 2)), n the number of sublayers, m the layers in one (2: n^(-1/2)), so that the change of the function
    per step does not grow with depth. Further scalar biases, from 0, stand before an MLP's activation, before its last
    layer and before the head. norm_layer is not used.
    Two differences: the paper also starts the head at zero, which would erase the embedding where the two are tied;
    and the authors' Transformer counts attention as m = 4 and scales queries and keys too, which stay as they are here.
    Raises ValueError for a sublayer without scale_branch, and where the number of sublayers is unknown.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, layers: int = 2):
        super().__init__(norm_layer)
        if layers < 2:
            raise ValueError(f"norm.layers counts the weight layers of a sublayer, at least 2; got {layers}")
        self.layers = layers

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        count = site.located("norm=fixup").count
        scale_branch(f, "norm=fixup", first=count ** (-1 / (2 * self.layers - 2)), last=0.0)
        return Residual(f, pre=Bias(), scale=nn.Parameter(torch.ones(1)))

    def inside(self, site: Site) -> nn.Module:
        return Bias() if site.kind in ("hidden", "last") else nn.Identity()

    def after(self, site: Site) -> nn.Module:
        return Bias()


class Bias(nn.Module):
    """x + b, one learned scalar for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.to(x.dtype)
