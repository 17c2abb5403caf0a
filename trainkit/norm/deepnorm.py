"""DeepNorm (DeepNet, Wang et al. 2022, arXiv:2203.00555): Post-LN with a weighted-up residual and a smaller branch."""

from collections.abc import Callable

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site, scale_branch


class DeepNorm(Placement):
    """h <- N(alpha · h + f(h)); alpha = (2 L)^(1/4), L the number of blocks.     h ──┬── f ── + ── N ──►
                                                                                      └─ alpha ┘
    Values, output projections and both MLP weights start multiplied by beta = (8 L)^(-1/4); queries and keys do not.
    It bounds the change of the output per update, so Post-LN trains at hundreds of layers. No norm before the head.
    These are the constants for decoder-only and encoder-only models (null: the formulas). The baseline of the same name
    in the Mix-LN and LNS code bases fixes alpha at its value for L = 32 and inverts beta; ours follows the paper and
    torchscale. Beta multiplies the usual weights, so the YAML sets model.init=plain.
    Raises ValueError for a sublayer without scale_branch, and where depth is unknown.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, alpha: float | None = None, beta: float | None = None):
        super().__init__(norm_layer)
        for key, value in (("alpha", alpha), ("beta", beta)):
            if value is not None and not value > 0:
                raise ValueError(f"norm.{key} must be positive; got {value}. Try null, the paper's formula")
        self.alpha, self.beta = alpha, beta

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        depth = site.located("norm=deepnorm").depth
        alpha = (2 * depth) ** 0.25 if self.alpha is None else self.alpha
        beta = (8 * depth) ** -0.25 if self.beta is None else self.beta
        scale_branch(f, "norm=deepnorm", first=beta, last=beta)
        return Residual(f, skip=alpha, post=self.norm(site))
