"""AdaB2N, adaptive balance of batch normalization (Lyu et al., NeurIPS 2023, arXiv:2310.08855)."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainkit.norm_layer.batch import BatchNorm
from trainkit.norm_layer.channels import over_ranks
from trainkit.norm_layer.stateful import recomputing, statistic, wide
from trainkit.norm_layer.task_ids import TaskAware, TaskIds, untold
from trainkit.norm_layer.weighted import add_affine, deviations, from_samples, to_samples


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
        with torch.no_grad():
            m = h.mean(2, dtype=wide(x.dtype))
            said, (running_mean, running_var, eta) = self.recall(m.sum(0), len(h))
        s, n = self._sample_weights(said, m)
        n = n * h.shape[2]
        # Ranks that have enough themselves need not ask.
        constant = n < 2 if len(h) * h.shape[2] < 2 else None
        rest = 1 - self._next(eta) if self.regularize and torch.is_grad_enabled() else None
        running = torch.stack([running_mean, running_var]).to(m.dtype)
        y, penalty, now = Balance.apply(h, *self._weights(x), s, m, running, constant, rest, self.eps, self.sync)  # type: ignore[misc]
        if rest is not None and not recomputing():  # which must still build the same graph
            self._noted.append(penalty)
        self.observe(now, n if constant is None else torch.where(constant, 0, n))
        return from_samples(y, x, self.axis)

    def take_penalty(self) -> Tensor | None:
        """The sum of R over the training forwards since the last call; None where there were none."""
        noted, self._noted = self._noted, []
        return reduce(torch.add, noted) if noted else None

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
        batch = said.composition(len(self.task_weight), self.sync, m.dtype)
        psi = self.task_weight.to(m.dtype)
        return SampleWeights.apply(psi, self.cur_tasks, batch.since, batch.log_counts, batch.share), batch.number  # type: ignore[return-value]

    def _blank(self) -> dict[str, Any]:
        return {**super()._blank(), "_noted": []}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tasks={len(self.task_weight)}, kappa={self.kappa}"


class SampleWeights(torch.autograd.Function):
    """s, (B,), of psi, (tasks,), with its exact gradient; since, log_counts, share: of the batch's `Composition`.

    psi is at work from T = since on: for a task in the batch once T > 0, for others once they are seen. Until then its
    exp(psi) is 0.
    """

    @staticmethod
    def forward(ctx, psi, cur_tasks, since, log_counts, share):
        psi = torch.where(since <= cur_tasks, psi, -torch.inf)
        c = torch.logaddexp(psi, log_counts)  # as its logarithm: a large psi must not overflow
        pi = c.softmax(0)
        ctx.save_for_backward(psi, c, pi, share)
        return (share * pi).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        psi, c, pi, share = ctx.saved_tensors
        if not len(g):
            return torch.zeros_like(psi), *(None,) * 4
        g = (share * g.unsqueeze(1)).sum(0)
        return (psi - c.logsumexp(0)).exp_() * (g - (pi * g).sum()), *(None,) * 4


class Balance(torch.autograd.Function):
    """y of x, (B, C, P), by the samples' weights s; R; and mean and var, (2, C), which are for looking at.

    m: (B, C), mean_hw of each sample. running: (2, C), which serve as constants where `constant`, 0-d, is true; None:
    nowhere. rest: 1 - eta, the share of the running statistics in their next values; None: R is not wanted, and 0.
    Two passes over x, and one more in the backward than BatchNorm's: everything else is on (B, C). With sync the
    gradients of x and s are those of the sum of all ranks' losses; the gradients of gain and bias stay the rank's.
    """

    @staticmethod
    def forward(ctx, x, gain, bias, s, m, running, constant, rest, eps: float, sync: str):
        column = s.unsqueeze(1)
        mean, share = over_ranks(sync, (column * m).sum(0), s.sum())
        if constant is not None:
            mean = torch.where(constant, running[0], mean)
        center = mean.view(1, -1, 1).expand(len(x), -1, 1)
        v = deviations(x, center)  # from the mean of all
        (var,) = over_ranks(sync, (column * v).sum(0))
        if constant is not None:
            var = torch.where(constant, running[1], var)
        y = F.batch_norm(x, mean, var, gain, bias, False, 0.0, eps) if x.numel() else torch.empty_like(x)
        now = torch.stack([mean, var])
        penalty, pull = m.new_zeros(()), None
        if rest is not None:
            gap = (now - running) * rest.to(now.dtype)
            penalty, pull = gap.square().sum() / len(mean), gap * (2 / len(mean))  # the next values are constants
        ctx.save_for_backward(x, gain, s, m, v, now, share, pull, constant)
        ctx.eps, ctx.sync = eps, sync
        ctx.mark_non_differentiable(now)
        return y, penalty, now

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, g_penalty, _):
        x, gain, s, m, v, now, share, pull, constant = ctx.saved_tensors
        mean, var = now
        if x.numel():
            gx, g_gain, g_bias = torch.ops.aten.native_batch_norm_backward(
                gy.contiguous(), x, gain, mean, var, None, None, False, ctx.eps, [True] * 3
            )
        else:
            gx, g_gain, g_bias = torch.zeros_like(x), torch.zeros_like(gain), torch.zeros_like(gain)

        # What mean and var do to all outputs, and to R.
        own = torch.zeros_like(now) if pull is None else pull * g_penalty
        along, total, own = over_ranks(ctx.sync, g_gain, g_bias, own)
        inverse = torch.rsqrt(var + ctx.eps)
        scale = gain * inverse
        g_var = torch.addcmul(own[1], scale * inverse, along, value=-0.5)
        g_mean = torch.addcmul(own[0], scale, total, value=-1)
        g_mean = torch.addcmul(g_mean, g_var * (1 - share), mean, value=-2)
        if constant is not None:
            g_mean, g_var = (torch.where(constant, 0.0, g) for g in (g_mean, g_var))

        g_s = torch.addcmul(g_mean * m, g_var, v).sum(1)
        if x.numel():
            each = (s / x.shape[2]).unsqueeze(1)
            center = mean.view(1, -1, 1).expand(len(x), -1, 1)
            add_affine(gx, x, center, (each * (2 * g_var)).unsqueeze(2), (each * g_mean).unsqueeze(2))
        return gx, g_gain, g_bias, g_s, *(None,) * 6
