"""Continual normalization (Pham, Liu & Hoi, ICLR 2022): a group norm, then a batch norm."""

from __future__ import annotations

from torch import Tensor

from trainkit.norm_layer.batch import BatchNorm
from trainkit.norm_layer.group import grouped


class ContinualNorm(BatchNorm):
    """y = BatchNorm(z), z = (x - mean_g)/sqrt(var_g + eps): mean_g, var_g over a group's channels and all positions of
    one sample, biased, without parameters; weight, bias and the running statistics are BatchNorm's, of z.

    The group norm takes out of each sample what differs from task to task before batch statistics are taken, which so
    lean less to the current task. groups=width is instance norm then BatchNorm, groups=1 layer norm then BatchNorm.
    Both halves have the same eps. In eval the group norm is still that of each sample.
    num_batches_tracked moves only where momentum=None needs it, as in the authors' code. The study of AdaB2N trains
    this layer without weight and bias; here, as in the authors' code, they are trained.
    On tokens the group norm averages over all positions, so it leaks the future in eval too.
    Raises ValueError where groups does not divide the width.
    """

    leaks_in_eval = True

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        groups: int = 32,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__(width, axis=axis, eps=eps, momentum=momentum, count=count, sync=sync)
        if groups < 1 or width % groups:
            raise ValueError(f"groups must divide the width {width}; got {groups}. Try groups=1")
        self.groups = groups

    def forward(self, x: Tensor, pad_mask: Tensor | None = None) -> Tensor:
        """x: samples first, channels on `axis`; pad_mask: of the batch norm, True at padding -> y, of x's shape."""
        if x.shape[self.axis] == self.num_features:  # else BatchNorm says what is wrong
            z = grouped(x.movedim(self.axis, 1), self.groups, None, None, self.eps)
            x = z.movedim(1, self.axis)
        return super().forward(x, pad_mask)

    def scale_shift(self) -> tuple[Tensor, Tensor]:
        raise ValueError("a ContinualNorm is no fixed affine map: its group norm depends on the sample")

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        counted = self.num_batches_tracked.clone()  # type: ignore[operator]
        super().update(statistics, seen)
        if self.momentum is not None:
            self.num_batches_tracked.copy_(counted)  # type: ignore[operator]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
