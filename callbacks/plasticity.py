"""Whether the network can still learn: its units, features and weights, looked at every so often."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from callbacks.probing import probe, publish
from trainkit.measure.modes import evaluating
from trainkit.measure.plasticity import (
    LAYERS,
    Statistics,
    Units,
    angular_update,
    drift,
    effective_lr,
    effective_rank_of,
    rows,
    singular_values,
    srank_of,
    stable_rank_of,
    statistics,
    weight_norm,
    weights,
)
from trainkit.optimizer.partition import Partition
from trainkit.task.base import Task

SVD_ROWS = 1024  # entries of an activation whose rank is taken, or twice its units where those are more
FOLLOWS_THE_GRADIENT = ("SGD", "SGDP")  # optimizers whose update is as long as the gradient


class Plasticity(Callback):
    """Every `every` optimizer steps, after the last one of each task, and after the last of all, logs per layer

        dormant/<layer>, dead/<layer>, active/<layer>     shares of the units that <layer> reads
        srank/<layer>, effective_rank/<layer>, stable_rank/<layer>      ranks of what it reads, (entries, units)
        weight_norm/<layer>, effective_lr/<layer>, angular_update/<layer>     its weight, and the step's turning of it
        bn_mean_drift/<layer>, bn_var_drift/<layer>       of running statistics, since the task's start

    and <name>/mean, over layers; the definitions are those of trainkit/measure/plasticity.py. A layer is a linear layer
    or convolution by its name in the model (for weights an embedding, too). Its units are the channels of its input:
    those of the layer before, past norm, activation and residual sum. What reads the network's input has none.

    The units are looked at on a fixed probe, about `samples` samples spread evenly over the validation set (each rank
    takes as many of its own share, and the ranks' numbers are averaged), in eval mode. The probe draws no random
    numbers and leaves parameters, statistics and modes as they were, so a run with it and one without are the same.
    Ranks are taken of at most max(1024, 2 · units) entries. It costs forward passes of the probe, a singular value
    decomposition per layer, and during the steps that are measured a copy of the weights.

    tau, srank_delta: thresholds. scale_free: whether a step is as long whatever the gradient's length, so that the
    effective learning rate is lr/‖W‖, or lr/‖W‖²; null: the first, unless the optimizer is plain SGD or SGDP.
    """

    def __init__(
        self,
        *,
        every: int = 500,
        samples: int = 256,
        tau: float = 0.025,
        srank_delta: float = 0.01,
        scale_free: bool | None = None,
    ):
        key = "callbacks.plasticity"
        for name, value in (("every", every), ("samples", samples)):
            if value < 1:
                raise ValueError(f"{key}.{name} must be at least 1; got {value}")
        if not tau >= 0:
            raise ValueError(f"{key}.tau must not be negative; got {tau}. Try 0.025, or 0 for dead units")
        if not 0 < srank_delta < 1:
            raise ValueError(f"{key}.srank_delta must be between 0 and 1; got {srank_delta}. Try 0.01")
        self.every, self.samples, self.tau, self.srank_delta = every, samples, tau, srank_delta
        self.scale_free = scale_free
        self._probe: list[Any] | None = None
        self._before: dict[str, Tensor] = {}  # the weights that the step in progress starts from
        self._statistics: Statistics = {}  # as they were when the task began

    # --- when -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        if stage == "fit" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError("callbacks=plasticity needs whole weights: one device, or trainer.strategy=ddp")

    def on_train_start(self, trainer: Trainer, pl_module: Task) -> None:  # type: ignore[override]
        self._weights = weights(pl_module.model)
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._ends = set(data.ends()) if hasattr(data, "ends") else set()  # the last steps of a stream's tasks
        if not self._statistics:
            self._statistics = statistics(pl_module.model)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._due(trainer.global_step + 1, pl_module):
            self._before = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or not self._due(step, pl_module):
            return
        with isolate_rng():
            found = self._of_weights(trainer, pl_module) | self._of_units(trainer, pl_module)
        now = statistics(pl_module.model)
        for layer, (mean, var) in drift(self._statistics, now).items():
            found |= {f"bn_mean_drift/{layer}": mean, f"bn_var_drift/{layer}": var}
        if step in self._ends:
            self._statistics = now
        self._before = {}
        if found:
            publish(trainer, pl_module, with_means(found))

    def _due(self, step: int, task: Task) -> bool:
        return step % self.every == 0 or step in self._ends or step == task.total_steps

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": self._statistics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._statistics = state_dict["statistics"]

    # --- what -------------------------------------------------------------------------------------------------------

    def _of_weights(self, trainer: Trainer, task: Task) -> dict[str, Tensor]:
        rates = {
            parameter: (float(group["lr"]), scale_free)
            for optimizer in trainer.optimizers
            for group, scale_free in self._groups(optimizer)
            for parameter in group["params"]
        }
        found = {}
        for layer, weight in self._weights.items():
            norm = found[f"weight_norm/{layer}"] = weight_norm(weight)
            if weight in rates:
                lr, scale_free = rates[weight]
                found[f"effective_lr/{layer}"] = effective_lr(lr, norm, scale_free=scale_free)
            if layer in self._before:
                found[f"angular_update/{layer}"] = angular_update(self._before[layer], weight)
        return found

    def _groups(self, optimizer: Any) -> Iterator[tuple[dict[str, Any], bool]]:
        """The groups of parameters, and whether the one who steps them is scale-free."""
        optimizer = getattr(optimizer, "optimizer", optimizer)  # Lightning's wrapper
        for child in optimizer.children if isinstance(optimizer, Partition) else [optimizer]:
            inferred = type(child).__name__ not in FOLLOWS_THE_GRADIENT
            for group in child.param_groups:
                yield group, inferred if self.scale_free is None else self.scale_free

    @torch.no_grad()
    def _of_units(self, trainer: Trainer, task: Task) -> dict[str, Tensor]:
        if self._probe is None:
            self._probe = probe(trainer.datamodule.val_dataloader(), self.samples)  # type: ignore[attr-defined]
        reading = Reading(task.model, batches=len(self._probe))
        with evaluating(task), reading, trainer.precision_plugin.forward_context():
            for batch in self._probe:
                reading.first = True
                task.loss(task.model, trainer.strategy.batch_to_device(batch))
        found = {}
        for layer, units in reading.units.items():
            found |= {
                f"dormant/{layer}": units.dormant(self.tau),
                f"dead/{layer}": units.dead(),
                f"active/{layer}": units.active(),
            }
            values = singular_values(torch.cat(reading.rows[layer]))
            found |= {
                f"srank/{layer}": srank_of(values, self.srank_delta),
                f"effective_rank/{layer}": effective_rank_of(values),
                f"stable_rank/{layer}": stable_rank_of(values),
            }
        return found


class Reading:
    """A context in which a model's layers note what they read; `first`: the next layer reads the network's input."""

    def __init__(self, model: nn.Module, *, batches: int):
        self.model, self.batches = model, batches
        self.units: dict[str, Units] = {}
        self.rows: dict[str, list[Tensor]] = {}
        self.first = True

    def __enter__(self) -> Reading:
        self._hooks = [
            module.register_forward_pre_hook(partial(self._note, name))
            for name, module in self.model.named_modules()
            if isinstance(module, (*LAYERS, nn.Embedding))
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.first or isinstance(module, nn.Embedding):
            self.first = False
            return
        h, axis = args[0].detach(), -1
        if isinstance(module, _ConvNd):
            axis = -1 - len(module.kernel_size)
        units = Units.of(h, axis)
        self.units[name] = self.units[name] + units if name in self.units else units
        most = max(SVD_ROWS, 2 * h.shape[axis])
        self.rows.setdefault(name, []).append(rows(h, axis, -(-most // self.batches)))


def with_means(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """And <kind>/mean of every <kind>/<layer>."""
    kinds: dict[str, list[Tensor]] = {}
    for name, value in found.items():
        kinds.setdefault(name.partition("/")[0], []).append(value.float())
    return found | {f"{kind}/mean": torch.stack(values).mean() for kind, values in kinds.items()}
