"""Batch normalization by estimated statistics (Qiao et al. 2019, arXiv:1911.09738), for batches of any size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm_layer.channels import from_rows, mean_square, number, over_ranks, to_rows
from trainkit.norm_layer.stateful import Stateful, statistic, wide


class EstimatedBatchNorm(Stateful):
    """y = weight · (x - m)/sqrt(v + eps) + bias, where m, v are the running statistics in training as in eval.

    A training forward first moves them, without gradient, by the speed s:
    v <- (1 - s) v + s · mean((x - m_old)²),  m <- (1 - s) m + s · mean(x), per channel over samples and positions
    (biased), and then normalizes by the new ones. So one image is batch enough. For the gradient, m and v are
    constants: x gets weight/sqrt(v + eps) · gy, which nothing centres, so a layer that is blind to scale should follow
    (batch_channel). s is a buffer; the authors set it from outside, along the learning rate (`set_speed`), from 0, with
    which nothing moves. Gradient accumulation moves it per micro-batch under count="call", which is intended;
    under count="step" each micro-batch is normalized by the state and its own statistics, and one move follows per
    optimizer step. weight, bias, m, v: (width,); no positions change nothing.
    """

    reads = ("running_mean", "running_var", "speed")

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        eps: float = 1e-5,
        speed: float = 0.0,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        self.expect_statistics(2, width)
        self.width, self.axis, self.eps = width, axis, eps
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.speed: Tensor
        self.register_buffer("running_mean", statistic(width))
        self.register_buffer("running_var", statistic(width, fill=1.0))
        self.register_buffer("num_batches_tracked", torch.tensor(0))  # stays 0; in the authors' checkpoints
        self.register_buffer("speed", statistic(1))
        set_speed(self, speed)

    def forward(self, x: Tensor) -> Tensor:
        """x: `width` channels on `axis` -> same shape and dtype."""
        mean, var = self._moved(x) if self.training else (self.running_mean, self.running_var)
        rows = x if x.dim() > 1 and self.axis % x.dim() == 1 else to_rows(x, self.axis, self.width)
        dtype = wide(x.dtype)
        mean, var, weight, bias = (t.to(dtype) for t in (mean, var, self.weight, self.bias))
        y = F.batch_norm(rows, mean, var, weight, bias, False, 0.0, self.eps)
        return y if rows is x else from_rows(y, x, self.axis)

    @torch.no_grad()
    def _moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The statistics that this training forward is normalized by; moves those of the layer."""
        rows = to_rows(x, self.axis, self.width)
        rows = rows.to(wide(x.dtype))
        total, n = over_ranks(self.sync, rows.sum(0), number(rows, None))
        mean = total / n.clamp(min=1)
        old_mean, old_var, speed = self.read(mean.to(self.running_mean.dtype))
        square, _ = mean_square(rows - old_mean.to(rows.dtype), None, self.sync)
        statistics = torch.stack([mean, square])
        self.observe(statistics, n)
        moved = [(1 - speed) * old + speed * new for old, new in zip((old_mean, old_var), statistics, strict=True)]
        return torch.where(n > 0, moved[0], old_mean), torch.where(n > 0, moved[1], old_var)

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
            self.replace(name, (1 - self.speed) * getattr(self, name) + self.speed * value, seen)

    def extra_repr(self) -> str:
        return f"{self.width}, axis={self.axis}, eps={self.eps:g}, count={self.count}"


def set_speed(model: nn.Module, speed: float) -> None:
    """From now on estimated statistics in `model` move by `speed` per update: 0 never, 1 to the batch's own."""
    if not 0 <= speed <= 1:
        raise ValueError(f"norm_layer.speed is a weight between 0 and 1; got {speed}. Try norm_layer.speed=0.1")
    for module in model.modules():
        if isinstance(module, EstimatedBatchNorm):
            module.speed.fill_(speed)
