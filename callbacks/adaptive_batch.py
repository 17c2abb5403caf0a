"""The batch grows when the gradient's noise asks for it (AdAdaGrad)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from trainkit.data.loader import GrowingLoader, Share
from trainkit.launch.console import log
from trainkit.measure.gradient_variance import (
    Variances,
    augmented_test,
    grown,
    inner_product_test,
    norm_test,
    per_sample_gradients,
    sums,
    variances,
)
from trainkit.task.base import Task

NEVER = 2**62  # a validation interval that no run reaches


class AdaptiveBatch(Callback):
    """Every `every` steps, tests whether the batch is large enough, and makes it as large as the test says.

    test: "norm" needs total variance / (eta² ‖g‖²) samples, "inner_product" the variance along the gradient g /
    (theta² ‖g‖⁴), "augmented" also the variance across it / (nu² ‖g‖²) (see measure/gradient_variance.py). The batch
    starts at data.batch_size, never shrinks, and never exceeds max_batch_size or the training set; when it has got
    there, testing stops. More samples go into a forward pass up to max_micro_batch on each device (null: as many as at
    the start, so that memory stays), beyond that more passes are accumulated.

    estimate: "micro" takes the variance of the gradients of the step's micro-batches and devices, joined into at most
    `groups` groups per device, so costs a few passes over them and 4 · groups bytes per parameter; a step of a single
    micro-batch on a single device is made of two halves instead. "sample" takes the gradient of every sample of the
    last micro-batch, by torch.func: a second pass, as many copies of the gradient as samples, and no batch statistics.

    Logs train/batch_size, train/samples_seen and, after a test, train/batch_needed. Schedules stay functions of
    optimizer steps, as trainer.max_steps is: where AdAdaGrad decays with the samples seen, a run whose batch grows
    decays later here. A run is continued at the sample where it stopped, with the batch that it had. The released code
    rounds a batch up to what the devices share evenly even beyond the maximum; here it is rounded down there.

    Paper: "AdAdaGrad: Adaptive Batch Size Schemes for Adaptive Gradient Methods" (Lau, Liu and Kolar 2024).
    """

    def __init__(
        self,
        *,
        test: str = "norm",
        eta: float = 0.1,
        theta: float = 0.1,
        nu: float = 0.1,
        max_batch_size: int = 1024,
        max_micro_batch: int | None = None,
        every: int = 1,
        estimate: str = "micro",
        groups: int = 4,
    ):
        key = "callbacks.adaptive_batch"
        tests: dict[str, Callable[[Variances], float]] = {
            "norm": lambda v: norm_test(v, eta=eta),
            "inner_product": lambda v: inner_product_test(v, theta=theta),
            "augmented": lambda v: augmented_test(v, theta=theta, nu=nu),
        }
        if test not in tests:
            raise ValueError(f"{key}.test is norm, inner_product or augmented; got {test!r}")
        if estimate not in ("micro", "sample"):
            raise ValueError(f"{key}.estimate is micro or sample; got {estimate!r}")
        for name, value in (("eta", eta), ("theta", theta), ("nu", nu)):
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{key}.{name} must be above 0; got {value}. Try 0.1")
        least = {"max_batch_size": (max_batch_size, 1), "every": (every, 1), "groups": (groups, 2)}
        for name, (value, minimum) in (least | {"max_micro_batch": (max_micro_batch or 1, 1)}).items():
            if value < minimum:
                raise ValueError(f"{key}.{name} must be at least {minimum}; got {value}")
        self.needed, self.estimate, self.groups, self.every = tests[test], estimate, groups, every
        self.max_batch_size, self.max_micro_batch = max_batch_size, max_micro_batch
        self._outcome: float | None = None  # samples that the last test of this step asked for
        self._snapshots: list[dict[Tensor, Tensor]] = []  # by parameter: the gradient accumulated up to a group's end
        self._sizes: list[int] = []  # micro-batches in each group
        self._batch: Any = None  # the micro-batch whose samples are looked at one by one
        self._testing = self._capturing = False
        self._hooks: list[Any] = []

    # --- the run ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError("callbacks=adaptive_batch needs whole gradients: one device, or trainer.strategy=ddp")
        if getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
            raise ValueError(
                "callbacks=adaptive_batch comes to accumulate more micro-batches, which trainer.static_graph=true "
                "cannot follow. Leave one of them out"
            )
        if trainer.max_epochs not in (None, -1):
            raise ValueError(
                "callbacks=adaptive_batch changes how many steps an epoch has, so the run's length must be told in "
                "steps: trainer.max_steps=… trainer.max_epochs=-1"
            )
        if trainer.limit_train_batches != 1.0 or trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError(
                "callbacks=adaptive_batch cannot count a changing batch in trainer.limit_train_batches or "
                "trainer.overfit_batches; leave them out"
            )
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "growing"):
            raise ValueError(
                f"callbacks=adaptive_batch needs data whose batches can grow; {type(data).__name__} has none"
            )
        data.growing = True

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        if pl_module.halves is not None:
            raise ValueError(
                f"{type(pl_module.gradient).__name__} compares halves of a batch of fixed accumulation, and "
                "callbacks=adaptive_batch changes that; leave one of them out"
            )
        loader = trainer.train_dataloader
        assert isinstance(loader, GrowingLoader)
        self.loader, configured = loader, trainer.accumulate_grad_batches
        self.configured, self.interval = configured, int(trainer.val_check_batch or NEVER) // configured
        first = trainer.datamodule.share()  # type: ignore[attr-defined]
        self.micro_batch = self.max_micro_batch or first.micro_batch
        self.most = min(self.max_batch_size, len(loader.source))
        for name, most, now in (
            ("max_batch_size", self.max_batch_size, first.batch_size),
            ("max_micro_batch", self.micro_batch, first.micro_batch),
        ):
            if most < now:
                raise ValueError(f"callbacks.adaptive_batch.{name}={most} is less than the run starts with, {now}")
        if trainer.global_step == 0:
            loader.begin(self._measurable(first))
        self.growing, self.batch_size = self._can_grow(), loader.share.batch_size
        trainer.accumulate_grad_batches = loader.share.accumulation
        # Whether the step that a checkpoint was made at is one that is validated.
        trainer.val_check_batch = 1 if trainer.global_step and trainer.global_step % self.interval == 0 else NEVER
        self.parameters = [p for p in pl_module.model.parameters() if p.requires_grad]
        if self.growing and self.estimate == "micro":
            # During backward: on several devices the gradient is averaged over them as soon as that ends.
            self._hooks = [p.register_post_accumulate_grad_hook(self._capture) for p in self.parameters]

    def _can_grow(self) -> bool:
        share = self.loader.share
        return share.grown(self.most, self.most, self.micro_batch) is not share

    def _measurable(self, share: Share) -> Share:
        """`share`, in at least two micro-batches if their gradients are to be compared."""
        if self.estimate == "sample" or share.world * share.accumulation > 1:
            return share
        if share.micro_batch % 2:
            raise ValueError(
                f"callbacks.adaptive_batch compares two halves of a batch: data.batch_size={share.batch_size} must be "
                f"even; try {share.batch_size + 1}, or callbacks.adaptive_batch.estimate=sample"
            )
        return replace(share, micro_batch=share.micro_batch // 2, accumulation=2)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        # A pass of the loader begins, the only time at which Lightning lets the accumulation change.
        share = self.loader.share
        trainer.accumulate_grad_batches = share.accumulation
        if pl_module.tokens_per_step is not None:
            pl_module.tokens_per_step = pl_module.tokens_per_step * share.batch_size // self.batch_size
        self.batch_size = share.batch_size

    def on_train_end(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        trainer.accumulate_grad_batches = self.configured  # what the loaders of the test set expect
        self._stop_capturing()

    def on_exception(self, trainer: Trainer, pl_module: Task, exception: BaseException) -> None:  # type: ignore[override]
        self._stop_capturing()

    # --- a step -----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        step, accumulation = trainer.global_step + 1, trainer.accumulate_grad_batches
        micro = batch_idx % accumulation
        last = micro == accumulation - 1
        # Lightning counts micro-batches between validations, of which steps have more and more.
        trainer.val_check_batch = 1 if last and step % self.interval == 0 else NEVER
        self._testing = self.growing and step % self.every == 0
        self._batch = batch if last and self._testing and self.estimate == "sample" else None
        if micro == 0:
            self._snapshots, self._sizes = [], []
        groups = min(accumulation, self.groups)
        ends = (micro + 1) * groups // accumulation > micro * groups // accumulation
        self._capturing = ends and self._testing and self.estimate == "micro"
        if self._capturing:
            self._sizes.append(micro + 1 - sum(self._sizes))
            self._snapshots.append({})

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Task, optimizer: Any) -> None:  # type: ignore[override]
        self._capturing = False
        if self._testing:
            outcome = self.needed(self._variances(trainer, pl_module))
            # All devices have the same numbers; that they also go on alike must not hang on the last bit of one.
            self._outcome = trainer.strategy.broadcast(outcome) if trainer.world_size > 1 else outcome
            self._snapshots, self._batch = [], None
        if pl_module.due:
            batch_size = self.loader.share.batch_size
            found: dict[str, float] = {
                "train/batch_size": batch_size,
                "train/samples_seen": self.loader.samples_seen() + batch_size,
            }
            if self._outcome is not None and math.isfinite(self._outcome):
                found["train/batch_needed"] = self._outcome
            pl_module.record({name: float(value) for name, value in found.items()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self._outcome is None:
            return
        share = self.loader.share
        size = grown(share.batch_size, self._outcome, self.most)
        more, self._outcome = share.grown(size, self.most, self.micro_batch), None
        if more is not share:
            self.loader.grow(more)
            log.info("step %d: the batch grows from %d to %d", trainer.global_step, share.batch_size, more.batch_size)
            self.growing = self._can_grow()
            if not self.growing:
                self._stop_capturing()

    # --- the variance -----------------------------------------------------------------------------------------------

    def _variances(self, trainer: Trainer, task: Task) -> Variances:
        """The variances of a sample's gradient about that of the step, which the parameters hold by now."""
        stepped = [p for p in self.parameters if p.grad is not None]
        mean = [p.grad for p in stepped if p.grad is not None]
        share = self.loader.share
        if self.estimate == "sample":
            stacks, sizes = self._per_sample(trainer, task, stepped), None
            groups = samples = len(self._batch[0]) * share.world
        else:
            stacks, sizes = self._per_group(trainer, stepped), [size * share.micro_batch for size in self._sizes]
            groups, samples = len(sizes) * share.world, share.batch_size
        totals = sums(stacks, mean, sizes)
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        widest = reduce(torch.promote_types, (gradient.dtype for gradient in mean), torch.float32)
        square = torch.stack(torch._foreach_norm(mean, 2, widest)).square().sum()
        *found, length = torch.cat((totals, square.to(totals)[None])).tolist()
        return variances(found, length, groups=groups, samples=samples, batch=share.batch_size)

    def _per_group(self, trainer: Trainer, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
        """For each parameter the mean gradients of this device's groups, (groups, *shape)."""
        scale = trainer.accumulate_grad_batches  # Lightning divides every micro-batch's loss by it
        scale = scale / trainer.scaler.get_scale() if trainer.scaler is not None else scale
        for p in parameters:
            rows, before = [], torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
            for snapshot, size in zip(self._snapshots, self._sizes, strict=True):
                now = snapshot[p].to(before.dtype) if p in snapshot else before
                rows.append((now - before) * (scale / size))
                before = now
            yield torch.stack(rows)

    def _per_sample(self, trainer: Trainer, task: Task, parameters: list[nn.Parameter]) -> list[Tensor]:
        """For each parameter the gradients of the samples of the last micro-batch, (samples, *shape)."""
        device = trainer.strategy.root_device
        generators = [device] if device.type == "cuda" else []
        # What is drawn here for dropout must not change what the training draws.
        with torch.random.fork_rng(devices=generators), trainer.precision_plugin.forward_context():
            found = per_sample_gradients(task.model, task.loss, self._batch)  # type: ignore[arg-type]
        by_parameter = {p: found[name] for name, p in task.model.named_parameters() if name in found}
        return [by_parameter[p] for p in parameters]

    def _capture(self, parameter: Tensor) -> None:
        if self._capturing and parameter.grad is not None:
            self._snapshots[-1][parameter] = parameter.grad.detach().clone()

    def _stop_capturing(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._snapshots = [], []
