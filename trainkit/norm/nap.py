"""NaP's norms (Lyle et al., NeurIPS 2024, arXiv:2407.01800): Pre-LN, and a norm before every activation."""

from torch import nn

from trainkit.norm.placement import Placement, Residual, Site


class NaP(Placement):
    """h <- h + f(N(h)), in f the hidden units φ(N(W z)); y = N(h).

        h ──┬── N ── W ── N ── φ ── W ── + ──►
            └────────────────────────────┘

    Every matrix that feeds an activation becomes scale invariant, which is what projection=nap, brought along by the
    YAML, turns into a constant effective learning rate. Biases before a norm are redundant, so the YAML asks for a
    model without, and for an untied head, as the output layer is not projected. Queries and keys, the input of
    attention's softmax, get theirs by model.qk_norm=head.
    """

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        return Residual(f, pre=self.norm(site))

    def inside(self, site: Site) -> nn.Module:
        return self.norm(site) if site.kind == "hidden" else nn.Identity()

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
