"""KEEL (Chen & Wei 2026, arXiv:2601.19895): Post-LN with a weighted-up residual and a norm on the sublayer's input."""

from collections.abc import Callable

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class Keel(Placement):
    """h <- N_out(alpha · h + f(N_in(h))).                      h ──┬── N ── f ── + ── N ──►
                                                                    └──── alpha ──┘
    alpha is the number of sublayers of the network (null: counted), which keeps the gradient's path through Post-LN
    open at a thousand layers. There is no norm before the head. The paper's code is not public; whether its first layer
    differs could not be read, so every sublayer is treated alike here.
    Raises ValueError where the number of sublayers is unknown.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, alpha: float | None = None):
        super().__init__(norm_layer)
        if alpha is not None and not alpha > 0:
            raise ValueError(f"norm.alpha must be positive; got {alpha}. Try null, the number of sublayers")
        self.alpha = alpha

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        alpha = site.located("norm=keel").count if self.alpha is None else self.alpha
        return Residual(f, pre=self.norm(site), skip=alpha, post=self.norm(site))
