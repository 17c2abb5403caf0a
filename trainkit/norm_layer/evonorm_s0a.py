"""EvoNorm-S0a: EvoNorm-S0 (Liu et al., NeurIPS 2020, arXiv:2004.02967) that normalizes without its activation too."""

from trainkit.norm_layer.evonorm import EvoNormS


class EvoNormS0a(EvoNormS):
    """y = gain · x sigmoid(v x) / sqrt(var + eps) + bias, as evonorm_s0, but with activation=False it divides too.

    Then y = gain · x / sqrt(var + eps) + bias. var (biased): of a group of channels over a sample's positions; gain,
    bias, v: (width,), starting at 1, 0, 1; groups must divide the width.
    The variant of pytorch-image-models, not of the paper: a norm that no activation follows still bounds what leaves a
    residual branch. Its eps is 1e-3. Samples are on the first axis; tokens leak the future.
    """

    def __init__(self, width: int, *, axis: int = -1, groups: int = 32, eps: float = 1e-3, activation: bool = True):
        super().__init__(width, axis=axis, groups=groups, eps=eps, activation=activation)
