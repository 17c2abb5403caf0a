"""EvoNorm-S0 (Liu et al., NeurIPS 2020, arXiv:2004.02967): group statistics and activation in one."""

from trainkit.norm_layer.evonorm import EvoNormS


class EvoNormS0(EvoNormS):
    """y = gain · x sigmoid(v x) / sqrt(var + eps) + bias; var: of a group of channels over a sample's positions.

    var is biased; gain, bias, v: (width,), starting at 1, 0, 1; groups must divide the width. Norm and activation in
    one, without batch statistics, so batches may be small. x is not centred, and x -> a x goes through the sigmoid as
    well: no blindness to scale. activation=False, for where none follows: y = gain · x + bias, nothing is normalized
    (evonorm_s0a divides there too). Samples are on the first axis; tokens leak the future.
    """

    idle = True

    def __init__(self, width: int, *, axis: int = -1, groups: int = 32, eps: float = 1e-5, activation: bool = True):
        super().__init__(width, axis=axis, groups=groups, eps=eps, activation=activation)
