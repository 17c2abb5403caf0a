"""AdaB2N, adaptive balance of batch normalization (Lyu et al., NeurIPS 2023, arXiv:2310.08855)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainkit.norm_layer.batch import BatchNorm
from trainkit.norm_layer.channels import over_ranks
from trainkit.norm_layer.stateful import recomputing, statistic
from trainkit.norm_layer.task_ids import TaskAware, TaskIds, untold
from trainkit.norm_layer.weighted import Groups, from_samples, moments, normalize, statistics, to_samples


class AdaB2N(TaskAware, BatchNorm):
    """BatchNorm whose batch statistics balance the tasks in a batch, and whose running ones interpolate two averages.

    With psi = task_weight, (tasks,), learned, from 0; n_t the samples of task t in the batch; T = cur_tasks, how many
    tasks have ended; t_i the task of sample i:
        c_t = exp(psi_t) + n_t;   pi_t = c_t / (c_0 + … + c_T);   s_i = pi_{t_i} / n_{t_i}
        mean = sum_i s_i mean_hw(x_i);   var = sum_i s_i mean_hw((x_i - mean)²);   y as BatchNorm's, with these
    A Dirichlet prior on the shares of tasks: psi = 0 adds one sample to each, psi -> inf gives all seen tasks the same
    weight, psi -> -inf the plain batch. A seen task that the batch lacks keeps its share, so the s_i then sum to less
    than 1 and both statistics shrink, as in the authors' code. Gradients reach psi. While T = 0, psi stands still and
    the statistics are BatchNorm's.
    The running statistics move towards the batch's, both biased, by the step eta, m = momentum:
        eta_1 = m^kappa;   eta <- eta / (eta + (1 - m)^kappa)
    kappa = 1 is BatchNorm's eta = m, kappa = 0 the mean of all batches since construction. In eval: BatchNorm's.
    regularize=True notes in each training forward, for `take_penalty`,
        R = mean_c (mean - running mean)² + mean_c (var - running var)²,   gradient only to mean and var,
    the running ones as this forward alone would leave them. Forwards without gradient note nothing; under reentrant
    activation checkpointing all are such.
    The layer must be told the tasks: `trainkit.norm_layer.task_ids.announce(model, ids)` before every training forward,
    which raises ValueError once T > 0 if it was not; announce(model, None) asks for plain statistics. Tasks beyond T
    take part where the batch has them (mixed streams). Fewer than two positions per channel are normalized by the
    running statistics, change nothing and have R = 0.
    count="call" moves eta and the running statistics per training forward, as the authors' code; "step" once per
    optimizer step, by the mean over its forwards. sync="mean": sums and the n_t run over all ranks. eta is a buffer,
    which the authors' code loses at a checkpoint. Raises ValueError for kappa outside of [0, 1] and momentum=None.
    """

    remembers = ("running_mean", "running_var", "eta")
    eta: Tensor
    cur_tasks: Tensor
    _noted: list[Tensor]

    def __init__(
        self,
        width: int,
        *,
        axis: int = -1,
        tasks: int,
        kappa: float = 0.4,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        regularize: bool = False,
        count: str = "call",
        sync: str = "none",
    ):
        super().__init__(width, axis=axis, eps=eps, momentum=momentum, count=count, sync=sync)
        if tasks < 1:
            raise ValueError(f"adab2n needs the stream's number of tasks, at least 1; got {tasks}")
        if not 0 <= kappa <= 1:
            raise ValueError(f"adab2n's kappa is from 0 (the mean of all batches) to 1 (BatchNorm's step); got {kappa}")
        if momentum is None or not 0 < momentum <= 1:
            raise ValueError(
                f"adab2n's step starts from a momentum in (0, 1]; got {momentum}. Set norm_layer.momentum=0.1; the "
                "mean of all batches is kappa=0"
            )
        self.kappa, self.regularize = kappa, regularize
        self.task_weight = nn.Parameter(torch.zeros(tasks))
        self.register_buffer("eta", statistic())  # the last step made; 0 before the first
        self.register_buffer("cur_tasks", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x: samples first, channels on `axis` -> y, of x's shape."""
        if not self.training:
            return super().forward(x)
        h = to_samples(x, self.axis, self.num_features)
        found = moments(h)
        said, (running_mean, running_var, eta) = self.recall(found[0].sum(0), len(h))
        s, n = self._sample_weights(said, found[0])
        n = n * h.shape[2]
        groups, constant = Groups(), n < 2
        stats = statistics(*found, s, groups, self.sync)
        running = torch.stack([running_mean, running_var])
        mean, var = (torch.where(constant, old, new) for old, new in zip(running, stats[:2], strict=True))
        weight, bias = (p.unsqueeze(0) for p in self._weights(x))
        stats = stats._replace(mean=mean, var=var)
        y, mean, var = normalize(h, weight, bias, s, found, stats, constant, groups, self.eps, self.sync)

        now = torch.cat([mean, var])
        if self.regularize and torch.is_grad_enabled():
            target = torch.lerp(running.to(now.dtype), now.detach(), self._next(eta).to(now.dtype))
            penalty = (now - target).square().mean(1).sum()
            if not recomputing():  # which must still build the same graph
                self._noted.append(penalty)
        self.observe(now.detach(), torch.where(constant, 0, n))
        return from_samples(y, x, self.axis)

    def take_penalty(self) -> Tensor | None:
        """The sum of R over the training forwards since the last call; None where there were none."""
        noted, self._noted = self._noted, []
        return torch.stack(noted).sum() if noted else None

    def update(self, statistics: Tensor, seen: Tensor) -> None:
        self.num_batches_tracked += seen  # type: ignore[operator]
        self.replace("eta", self._next(self.eta), seen)
        for name, value in zip(("running_mean", "running_var"), statistics, strict=True):
            self.replace(name, torch.lerp(getattr(self, name), value.to(self.eta.dtype), self.eta), seen)

    def _next(self, eta: Tensor) -> Tensor:
        """The step after one of `eta`."""
        assert self.momentum is not None
        return torch.where(eta > 0, eta / (eta + (1 - self.momentum) ** self.kappa), self.momentum**self.kappa)

    def _sample_weights(self, said: TaskIds | None, m: Tensor) -> tuple[Tensor, Tensor]:
        """s, (B,), and how many samples all ranks have, 0-d; m: (B, C)."""
        if said is None or said.ids is None:
            if said is None and int(self.cur_tasks) > 0:
                raise untold(self)
            (n,) = over_ranks(self.sync, torch.full((), len(m), dtype=m.dtype, device=m.device))
            return (1 / n.clamp(min=1)).expand(len(m)), n
        counts = said.counts(len(self.task_weight), self.sync).to(m.dtype)
        tasks = torch.arange(len(counts), device=m.device)
        # c_t as its logarithm: a large psi must not overflow.
        shares = torch.logaddexp(self.task_weight.to(m.dtype), counts.log())
        shares = shares.masked_fill((tasks > self.cur_tasks) & (counts == 0), -torch.inf).softmax(0)
        n = counts.sum()
        per_sample = torch.where(self.cur_tasks > 0, shares / counts.clamp(min=1), 1 / n.clamp(min=1))
        return torch.where(said.ids.unsqueeze(1) == tasks, per_sample, 0.0).sum(1), n

    def _blank(self) -> dict[str, Any]:
        return {**super()._blank(), "_noted": []}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tasks={len(self.task_weight)}, kappa={self.kappa}"
