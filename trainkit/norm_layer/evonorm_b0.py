"""EvoNorm-B0 (Liu et al., NeurIPS 2020, arXiv:2004.02967): batch and instance statistics, non-linear by a maximum."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.norm_layer.channels import affine, over_ranks
from trainkit.norm_layer.evonorm import Activating, as_given, by_channel, shaped
from trainkit.norm_layer.ranks import summed
from trainkit.norm_layer.stateful import Stateful, statistic, wide


class EvoNormB0(Activating, Stateful):
    """y = gain · x / max(sqrt(var + eps), v x + sqrt(var_i + eps)) + bias, per channel: norm and activation in one.

    var: of the batch, over samples and positions; var_i: of a sample over its positions; both biased and not centring
    x. gain, bias, v: (width,), starting at 1, 0, 1. In eval the running variance stands for var:
    running <- (1 - momentum) running + momentum · unbiased var; var_i is always the sample's own. activation=False, for
    where none follows: y = gain · x + bias, and nothing is normalized or observed.
    Good in large batches of images; it needs positions, since one alone has var_i = 0. Fewer than two positions in the
    whole batch take the running variance and change nothing. count and sync: see Stateful; eps is that of
    pytorch-image-models. The first axis is the samples; tokens leak the future, in eval too (var_i).
    """

    leaks_in_eval = True

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-3,
        momentum: float = 0.1,
        activation: bool = True,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        self.expect_statistics(1, width)
        self.width, self.axis, self.eps, self.momentum = width, axis, eps, momentum
        self.gain, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.v = nn.Parameter(torch.ones(width)) if activation else None
        self.running_var: Tensor
        self.register_buffer("running_var", statistic(width, fill=1.0))

    def forward(self, x: Tensor) -> Tensor:
        """x: `width` channels on `axis` -> same shape and dtype."""
        if self.v is None:
            return affine(x, self.gain.to(wide(x.dtype)), self.bias.to(wide(x.dtype)), self.axis)
        h = by_channel(x, self.axis, self.width)
        var = shaped(self._batch_variance(h) if self.training else self.running_var, h)
        var_i = h.var(2, correction=0, keepdim=True)
        root = torch.maximum((var + self.eps).sqrt(), shaped(self.v, h) * h + (var_i + self.eps).sqrt())
        return as_given(torch.addcmul(shaped(self.bias, h), h / root, shaped(self.gain, h)), x, self.axis)

    def _batch_variance(self, h: Tensor) -> Tensor:
        """The biased variance (C,) over samples, positions and ranks; also observed, the unbiased one."""
        with torch.no_grad():
            positions = torch.full((), h.shape[0] * h.shape[2], dtype=h.dtype, device=h.device)
            total, n = over_ranks(self.sync, h.sum((0, 2)), positions)
            mean = total / n.clamp(min=1)
        # The variance is at its least in the mean, so that as a constant loses no gradient.
        var = summed(self.sync, (h - mean.unsqueeze(1)).square().sum((0, 2))) / n.clamp(min=1)
        enough = n >= 2
        self.observe((var.detach() * n / (n - 1)).unsqueeze(0), torch.where(enough, n, 0.0))
        return torch.where(enough, var, self.running_var.to(var.dtype))

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        self.replace("running_var", (1 - self.momentum) * self.running_var + self.momentum * statistics[0], seen)

    def extra_repr(self) -> str:
        return f"{self.width}, axis={self.axis}, eps={self.eps:g}, activation={self.activates}, count={self.count}"
