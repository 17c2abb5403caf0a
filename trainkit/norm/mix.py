"""Mix-LN (Li, Yin & Liu, ICLR 2025, arXiv:2412.13795): Post-LN in the first blocks, Pre-LN in the rest."""

from collections.abc import Callable
from math import floor

from torch import nn

from trainkit.norm.placement import Placement, Site
from trainkit.norm.post import Post
from trainkit.norm.pre import Pre


class Mix(Placement):
    """Blocks l < K are Post-LN, the others Pre-LN; K = floor(alpha · depth); one norm before the head.

    Both sublayers of a block share the choice. It evens the gradient norms of shallow and deep blocks.
    The paper gives alpha (0.25; 0.0625 at 7B); its code takes K itself.
    """

    def __init__(self, norm_layer: Callable[..., nn.Module], *, alpha: float = 0.25):
        super().__init__(norm_layer)
        if not 0 <= alpha <= 1:
            raise ValueError(f"norm.alpha is the share of Post-LN blocks, between 0 and 1; got {alpha}. Try 0.25")
        self.alpha, self.pre, self.post = alpha, Pre(norm_layer), Post(norm_layer)

    def around(self, f: nn.Module, site: Site) -> nn.Module:
        # The small term keeps a product such as 0.29 · 100 = 28.999… from losing a block.
        post_blocks = floor(self.alpha * site.located("norm=mix").depth + 1e-9)
        return (self.post if site.layer < post_blocks else self.pre).around(f, site)

    def after(self, site: Site) -> nn.Module:
        return self.norm(site)
