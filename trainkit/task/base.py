"""The training step, the optimizer and the log of every task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._pytree import tree_map
from torchmetrics import Metric

from trainkit.continual.strategy import Strategy
from trainkit.norm_layer.stateful import Stateful
from trainkit.optimizer.partition import by_role, scale_lr, split
from trainkit.task.halves import Halves
from trainkit.task.replay import Replay


class SkipStep(Exception):
    """Raised once a step's gradients are complete, by whoever finds that it must not be taken."""


class Task(LightningModule):
    """Trains `model` on batches: learner -> loss -> backward -> gradient treatment -> optimizer -> projection.

    A leaf says what the loss of a batch is (`loss`) and how it evaluates one. What is to be logged about a training
    step is handed to `record`; when the step is due (the first, every `log_every_n_steps`-th, the last) all of it
    goes to the loggers as one object, after one transfer from the device.

    A gradient treatment and a projection are functions; what else they provide is called where it exists: `prepare`
    before training, with (model, optimizer) or (optimizer); `state_dict` and `load_state_dict` around checkpoints; the
    treatment's `begin_step` and `first_half` (trainkit/gradient/agvm.py), the projection's `penalty`.
    """

    tokens_per_step: int | None = None  # over all ranks and accumulated batches
    flops_per_token: int | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: partial[torch.optim.Optimizer],
        schedule: partial[Callable[[int], float]],
        gradient: Callable[[list[Tensor]], dict[str, Tensor]],
        projection: Callable[[nn.Module], None],
        strategy: Strategy,
        learner: Callable[..., tuple[Tensor, dict[str, Tensor]]],
    ):
        super().__init__()
        self.strategy = strategy
        self.model = strategy.convert(model)
        self.optimizer_factory, self.schedule = optimizer, schedule
        self.gradient, self.projection, self.learner = gradient, projection, learner
        self.step = 0  # the optimizer step in progress, counted from 1
        self.total_steps = 0
        self.due = False
        self.metrics: dict[str, float] = {}  # what was logged last
        self._records: dict[str, Tensor | float] = {}
        self._losses: list[Tensor] = []  # of the batches accumulated into the step in progress
        self._parameters_of_model: list[nn.Parameter] = []
        self.keep_buffers = False
        self.buffers_before: list[Tensor] = []  # with keep_buffers, the model's before the step in progress
        self.replay: Replay | None = None  # for optimizers that need a second gradient
        self.halves: Halves | None = None  # for treatments that compare two halves of the batch

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss of a batch, 0-d."""
        raise NotImplementedError

    @property
    def milestone(self) -> bool:
        """Whether the optimizer step done last is one that a checkpoint should be made at, whatever their rhythm."""
        return False

    # --- optimization -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        self.total_steps = int(self.trainer.estimated_stepping_batches)
        factory, words = split(self.optimizer_factory)
        optimizer = by_role(self.model, factory, **words)
        scale_lr(optimizer, getattr(self.trainer.datamodule, "batch_size", 0))  # type: ignore[attr-defined]
        # Fused optimizers would undo the scale of the loss in their kernel, after the treatment of the gradient.
        optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
        self.replay = Replay(self) if hasattr(optimizer, "again") else None
        if self.replay is not None and getattr(self.learner, "remembers_batches", False):
            raise ValueError(
                f"{type(optimizer).__name__} takes two gradients of every batch, but {type(self.learner).__name__} "
                "remembers each batch that it sees. Try another optimizer"
            )
        if self.replay is not None:
            if self.trainer.scaler is not None:
                raise ValueError(
                    f"{type(optimizer).__name__} takes two gradients per step, which trainer.precision=16-mixed cannot "
                    "repeat, as it steps without a closure. Try bf16-mixed or 32-true"
                )
            optimizer.again = self.replay  # type: ignore[attr-defined]
        if hasattr(self.gradient, "prepare"):  # before the projection's hook, so that its own sees the step alone
            self.gradient.prepare(self.model, optimizer)  # type: ignore[attr-defined]
        self.halves = Halves(self) if hasattr(self.gradient, "first_half") else None
        if hasattr(self.projection, "prepare"):
            self.projection.prepare(optimizer)  # type: ignore[attr-defined]
        self.projection(self.model)
        optimizer.register_step_post_hook(lambda *_: self.projection(self.model))
        # Both found once: walking through a model's modules takes as long as one of its layers does, where it is small.
        stateful = [module for module in self.model.modules() if isinstance(module, Stateful)]

        def advance(*_: Any) -> None:
            for module in stateful:
                module.advance()

        optimizer.register_step_post_hook(advance)
        self._parameters_of_model = list(self.model.parameters())
        options = dict(self.schedule.keywords) if isinstance(self.schedule, partial) else {}
        if options.get("total") is None:
            options["total"] = self.total_steps
        schedule = self.schedule.func(**options) if isinstance(self.schedule, partial) else self.schedule(**options)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"},
        }

    def on_train_start(self) -> None:
        # A checkpoint brings the rate that the step to come would have had; the schedule may be longer now.
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        for scheduler in (s for s in schedulers if isinstance(s, LambdaLR)):
            rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [lr * factor(scheduler.last_epoch) for lr, factor in rates]
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = lr

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.step = self.trainer.global_step + 1
        place = batch_idx % self.trainer.accumulate_grad_batches
        if self.keep_buffers and place == 0:
            self.buffers_before = [buffer.clone() for buffer in self.model.buffers()]
        if place == 0:  # Lightning does so after the forward, which would have to find room beside the old gradients
            for p in self._parameters_of_model:
                p.grad = None
        if place == 0 and hasattr(self.gradient, "begin_step"):
            wanted = self.gradient.begin_step(self.step)  # type: ignore[attr-defined]
            if self.halves is not None:
                self.halves.wanted = wanted
        if self.replay is None:
            self.before_micro_batch(place)
        stepping = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        self.due = stepping and self.due_at(self.step)

    def due_at(self, step: int) -> bool:
        """Whether what is recorded about an optimizer step is logged."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return step == 1 or step % every == 0 or step == self.total_steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first = self.replay is None or self.replay.note(batch, batch_idx)
        loss, values = self.learner(self.model, batch, self.loss)
        penalty = self.strategy.penalty(self.model)
        if hasattr(self.projection, "penalty"):
            penalty = penalty + self.projection.penalty(self.model)  # type: ignore[attr-defined]
        if first:
            self._losses.append(loss.detach())
            self.record({f"train/{name}": value for name, value in values.items()})
        return loss + penalty

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        except SkipStep:  # raised within the closure, before the optimizer has touched anything
            optimizer.zero_grad()
            if self.replay is not None:
                self.replay.kept.clear()
            if self.halves is not None and self.halves.wanted:
                self.halves.take()

    def before_micro_batch(self, place: int) -> None:
        """Before the pass whose gradient is stepped with takes micro-batch number `place` of the step."""
        if self.halves is not None:
            self.halves.before(place)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.replay is None:  # else it is the second gradient that is stepped with
            self.treat_gradient()

    def treat_gradient(self) -> None:
        """Applies the gradient treatment to the gradients, which are complete and unscaled."""
        if self.halves is not None and self.halves.wanted:
            self.gradient.first_half(*self.halves.take())  # type: ignore[attr-defined]
        gradients = [p.grad for p in self._parameters_of_model or self.model.parameters() if p.grad is not None]
        self.record(self.gradient(gradients))

    # --- evaluation ---------------------------------------------------------------------------------------------

    evaluation: nn.ModuleDict  # torchmetrics, which average over batches and ranks

    def evaluate(self, stage: str, batch: Any) -> None:
        """Updates the metrics of `stage` ("val" or "test") with a batch."""
        raise NotImplementedError

    def results(self, stage: str) -> dict[str, float]:
        """The metrics of `stage` by name, over everything evaluated since the last call."""
        raise NotImplementedError

    def mean(self, name: str) -> float:
        """The value of a metric, which starts afresh."""
        metric = self.evaluation[name]
        assert isinstance(metric, Metric)
        value = float(metric.compute())
        metric.reset()
        return value

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        self.publish({f"val/{name}": value for name, value in self.results("val").items()})

    def on_test_epoch_end(self) -> None:
        self.publish({f"test/{name}": value for name, value in self.results("test").items()})

    # --- the log ------------------------------------------------------------------------------------------------

    def record(self, values: dict[str, Tensor] | dict[str, float]) -> None:
        """Notes 0-d tensors or numbers about the training step in progress, to be logged if it is due."""
        self._records.update(values)

    def step_loss(self) -> Tensor | None:
        """The mean loss of the micro-batches that the step in progress has seen, 0-d, until it is logged."""
        if len(self._losses) == 1:
            return self._losses[0]
        return torch.stack(self._losses).mean() if self._losses else None

    def flush(self) -> None:
        """Hands what was recorded to the loggers: one stacked transfer, averaged over the ranks."""
        loss = self.step_loss()
        if loss is not None:
            self._records["train/loss"] = loss
            self._losses.clear()
        if not self._records:
            return
        tensors = {name: value for name, value in self._records.items() if isinstance(value, Tensor)}
        self.metrics = {name: float(value) for name, value in self._records.items() if name not in tensors}
        if tensors:
            stacked = self._stacked(list(tensors.values()))
            if self.trainer.world_size > 1:
                stacked = self.trainer.strategy.reduce(stacked, reduce_op="mean")
            self.metrics |= dict(zip(tensors, stacked.tolist(), strict=True))
        self._records.clear()
        self.publish(self.metrics)

    def _stacked(self, values: list[Tensor]) -> Tensor:
        """0-d tensors as one, on the task's device, in the widest of their dtypes and at least float32."""
        dtypes = {value.dtype for value in values}
        widest = reduce(torch.promote_types, dtypes, torch.float32)
        # Nearly always alike already; asking each of a hundred to be what it is would cost more than stacking them.
        if dtypes != {widest} or {value.device for value in values} != {self.device}:
            values = [value.to(self.device, widest) for value in values]
        return torch.stack(values).detach()

    def publish(self, metrics: dict[str, float]) -> None:
        """Writes numbers to every logger at the optimizer step done last, and where callbacks look for them."""
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.trainer.global_step)
        values = torch.tensor(list(metrics.values()), dtype=torch.float32).unbind()
        self.trainer.callback_metrics.update(dict(zip(metrics, values, strict=True)))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches:
            return
        if self.due:
            self.flush()
        self._records.clear()
        self._losses.clear()
        if self.step == self.total_steps:
            self.trainer.should_stop = True  # makes Lightning validate after the last step, whatever the interval

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # A checkpoint must never be ahead of the log: what it covers is on disk before it is.
        if self.due:
            self.flush()
        for name, plugin in self._with_state():
            state = plugin.state_dict()
            checkpoint[name] = {
                "of": type(plugin).__name__,
                "state": by_rank(state) if name == "learner" else state,
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, plugin in self._with_state():
            saved = checkpoint.get(name, {})
            if saved.get("of") != type(plugin).__name__:  # a run may go on with another one
                continue
            state = saved["state"]
            if name == "learner":
                if len(state) != self.trainer.world_size:
                    raise ValueError(
                        f"the learner's memory is kept by process, and the run to be resumed had {len(state)} of them, "
                        f"this one has {self.trainer.world_size}; use as many as before"
                    )
                state = state[self.trainer.global_rank]
            plugin.load_state_dict(state)

    def _with_state(self) -> list[tuple[str, Any]]:
        """The plugins that carry something from step to step, which is not in the model."""
        plugins = {"gradient": self.gradient, "projection": self.projection, "learner": self.learner}
        return [(name, plugin) for name, plugin in plugins.items() if hasattr(plugin, "state_dict")]


def by_rank(mine: Any) -> list[Any]:
    """Every rank's value, by rank, on all of them; for what a checkpoint must hold of each."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    # Through the CPU: a tensor of another rank's device would be unpacked onto that device.
    mine = tree_map(lambda value: value.cpu() if isinstance(value, Tensor) else value, mine)
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def wide(logits: Tensor) -> Tensor:
    """In at least float32: half precision is too coarse for a sum of exponentials."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
