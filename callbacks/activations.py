"""What the activations of the network look like, block by block, looked at every so often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.seed import isolate_rng

from callbacks.probing import probe, publish
from trainkit.launch.console import log
from trainkit.measure.look import Seen, inspect
from trainkit.report.canvas import write_csv
from trainkit.task.base import Task


class Activations(Callback):
    """After the first optimizer step, every `every` steps, and after the last, logs by block, blocks.3,

        hidden_variance, hidden_mean_square, hidden_max, massive_ratio, massive_count, residual_sink, hidden_rank,
        hidden_nuclear_norm     of what the block puts out; with /embed for what the first block reads
        angular_distance, block_influence, deletion_drop     what the block does
        attention_entropy, attention_entropy_min, attention_sink, attention_logit     of its attention

    and logit_rms, logit_max; trainkit/measure/look.py defines them. The angular distances between all pairs of layers,
    as they are at the last look, lie in <run>/angular_distance.csv. What a network does not have (attention, blocks, a
    stream of one width) is left out, which is said once.

    The network is looked at on a fixed probe, about `samples` samples spread evenly over the validation set (each rank
    takes as many of its own share; means are averaged over the ranks, maxima are the largest), in eval mode. The probe
    draws no random numbers and leaves parameters, buffers and modes as they were, so a run with it and one without are
    the same. It costs one forward pass of the probe, one more per block for deletion_drop unless deletion=false, and
    a singular value decomposition per block. tokens: angular distances over all tokens, or over the last of each
    sequence alone, as in the papers' released code.
    """

    def __init__(self, *, every: int = 500, samples: int = 16, tokens: str = "all", deletion: bool = True):
        key = "callbacks.activations"
        for name, value in (("every", every), ("samples", samples)):
            if value < 1:
                raise ValueError(f"{key}.{name} must be at least 1; got {value}")
        if tokens not in ("all", "last"):
            raise ValueError(f"{key}.tokens is all or last; got {tokens!r}")
        self.every, self.samples, self.tokens, self.deletion = every, samples, tokens, deletion
        self._probe: list[Any] | None = None
        self._said: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: Task, stage: str) -> None:  # type: ignore[override]
        if stage == "fit" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError("callbacks.activations needs whole weights: one device, or trainer.strategy=ddp")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Task, outputs: Any, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and (
            step == 1 or step % self.every == 0 or step == pl_module.total_steps
        ):
            with isolate_rng():
                seen = self._look(trainer, pl_module)
            publish(trainer, pl_module, seen.means, seen.maxima)
            self._write(trainer, seen)

    def _look(self, trainer: Trainer, task: Task) -> Seen:
        if self._probe is None:
            self._probe = probe(trainer.datamodule.val_dataloader(), self.samples)  # type: ignore[attr-defined]
        batches = [trainer.strategy.batch_to_device(batch) for batch in self._probe]
        context = trainer.precision_plugin.forward_context
        return inspect(task, batches, tokens=self.tokens, deletion=self.deletion, context=context)

    def _write(self, trainer: Trainer, seen: Seen) -> None:
        distances = seen.distances
        if distances is not None and trainer.world_size > 1:
            distances = trainer.strategy.reduce(distances, reduce_op="mean")
        if not trainer.is_global_zero:
            return
        for line in seen.left_out:
            if line not in self._said:
                self._said.add(line)
                log.info("callbacks.activations: %s", line)
        if distances is not None:
            table = zip(seen.layers, distances.tolist(), strict=True)
            path = Path(trainer.default_root_dir) / "angular_distance.csv"
            write_csv(path, ["layer", *seen.layers], ([name, *row] for name, row in table))
