"""Batch normalization with a set of its own, parameters and statistics, for each task of a stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm_layer.stateful import statistic, wide
from trainkit.norm_layer.task_ids import TaskAware, untold
from trainkit.norm_layer.weighted import Groups, flat, from_samples, moments, normalize, planes, statistics, to_samples


class TaskBatchNorm(TaskAware):
    """BatchNorm of task t for the samples of task t: weight, bias, running_mean, running_var, each (tasks, width).

    y_i = weight_t (x_i - mean_t)/sqrt(var_t + eps) + bias_t, t the task of sample i; mean_t, var_t over the batch's
    samples of task t alone, replayed ones among them, biased in y and unbiased in the running statistics, which move
    as BatchNorm's (momentum=None: the mean of all batches with the task). At most 4 · width numbers per task; what one
    task does to the statistics no other one sees. A set moves when its task's samples come, in this batch or by
    replay; but an optimizer with momentum goes on moving its weight and bias for some steps, as their gradients are
    then 0 and not missing (missing ones break DistributedDataParallel).
    The tasks are told by `trainkit.norm_layer.task_ids.announce(model, ids)`, before every training forward (else
    ValueError) and every evaluation: then samples have their own task's set. An evaluation of which nothing is known
    uses the set of the task in progress, `current`, for all samples. Sets of tasks that were never trained are as at
    the start. A task with fewer than two positions per channel in the batch is normalized by its running statistics,
    which stay.
    count="call": running statistics move per training forward; "step": once per optimizer step. sync="mean": over the
    samples of all ranks.
    """

    leaks = True
    remembers = ("running_mean", "running_var")
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    current: Tensor
    role = "vector"  # to optimizers: a table of vectors, not a matrix

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        tasks: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__(count=count, sync=sync)
        if tasks < 1:
            raise ValueError(f"task_bn needs the stream's number of tasks, at least 1; got {tasks}")
        self.width, self.axis, self.eps, self.momentum, self.tasks = width, axis, eps, momentum, tasks
        # Sums of n mean, n var and n over the forwards of a step, as the tasks' numbers of positions n differ.
        self.expect_statistics(3 * tasks, width)
        self.weight, self.bias = nn.Parameter(torch.ones(tasks, width)), nn.Parameter(torch.zeros(tasks, width))
        self.register_buffer("running_mean", statistic(tasks, width))
        self.register_buffer("running_var", statistic(tasks, width, fill=1.0))
        self.register_buffer("num_batches_tracked", torch.zeros(tasks, dtype=torch.long))
        self.register_buffer("current", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """x: samples first, channels on `axis` -> y, of x's shape."""
        h = to_samples(x, self.axis, self.width)
        y = self._train(h) if self.training else self._evaluate(h)
        return from_samples(y, x, self.axis)

    def _train(self, h: Tensor) -> Tensor:
        found = moments(h)
        said, (running_mean, running_var) = self.recall(found[0].sum(0), len(h))
        if said is None or said.ids is None:
            raise untold(self)
        counts = said.counts(self.tasks, self.sync).to(found[0].dtype)
        groups, s = Groups(said.ids, self.tasks), 1 / counts[said.ids]
        stats = statistics(*found, s, groups, self.sync)
        n = (counts * h.shape[2]).unsqueeze(1)
        constant = n < 2
        mean, var = torch.where(constant, running_mean, stats.mean), torch.where(constant, running_var, stats.var)
        affine = (p.to(s.dtype) for p in (self.weight, self.bias))
        y = normalize(h, *affine, s, found, stats._replace(mean=mean, var=var), constant, groups, self.eps, self.sync)

        n = torch.where(constant, 0.0, n).expand_as(mean)
        sums = torch.cat([n * mean, n * var * n / (n - 1).clamp(min=1), n])
        self.observe(sums, n.sum().sign())
        return y

    def _evaluate(self, h: Tensor) -> Tensor:
        sets = (self.running_mean, self.running_var, self.weight, self.bias)
        if self.said is None or self.said.ids is None or self.said.training:
            index = self.current.expand(len(h))
        else:
            index = self.said.ids
        if len(index) != len(h):
            raise ValueError(
                f"TaskBatchNorm was told the tasks of {len(index)} samples and evaluates a batch of {len(h)}. "
                "Call strategy.begin_batch(model, task_ids) before every evaluation, or never"
            )
        if h.numel() == 0:
            return h
        mean, var, weight, bias = (flat(values.to(wide(h.dtype)).index_select(0, index), h) for values in sets)
        return F.batch_norm(planes(h), mean, var, weight, bias, False, 0.0, self.eps).view(h.shape)

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        mean, var, n = statistics.chunk(3)
        seen = seen & (n > 0)
        self.num_batches_tracked += seen.any(1)
        step = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.clamp(min=1).unsqueeze(1)
        for name, total in (("running_mean", mean), ("running_var", var)):
            value = total / n.where(n > 0, torch.ones_like(n))
            self.replace(name, (1 - step) * getattr(self, name) + step * value, seen)

    def extra_repr(self) -> str:
        return f"{self.width}, tasks={self.tasks}, axis={self.axis}, count={self.count}"
