"""The Lightning Trainer as trainkit uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from trainkit.launch.checkpoint_file import InPlace
from trainkit.launch.process.engine import check_devices, check_engine, engine
from trainkit.launch.process.machine import default_threads
from trainkit.launch.process.precision import check_precision, choose_precision
from trainkit.model.parts.recompute import blocks_of, recompute


def trainer(
    *,
    max_steps: int = -1,
    max_epochs: int = -1,
    val_check_interval: int = 300,
    accumulate_grad_batches: int = 1,
    log_every_n_steps: int = 10,
    threads: int | None = None,
    accelerator: str = "auto",
    devices: int | str | list[int] = 1,
    num_nodes: int = 1,
    strategy: Any = "auto",
    static_graph: bool = False,
    find_unused_parameters: bool = False,
    gradient_as_bucket_view: bool = True,
    bucket_cap_mb: float = 25,
    gradient_compression: str = "none",
    reshard_after_forward: bool = True,
    checkpoint: str = "full",
    activation_checkpointing: bool = False,
    precision: str | None = "auto",
    deterministic: bool = False,
    run_dir: Path | None = None,
    callbacks: Any = None,
    **options: Any,
) -> Trainer:
    """lightning.Trainer with what is ours switched off there: logging, checkpoints, progress, samplers, clipping.

    Loggers are set on it later, when the run's directory exists.
    `val_check_interval` counts optimizer steps, over epochs. `threads` are the intra-op threads of each process; null
    divides the cores among this machine's ranks. strategy: ddp and fsdp are ours (ddp.py and fsdp.py here), with the
    options behind it; with activation_checkpointing blocks run again in the backward (model/parts/recompute.py).
    Everything else is the Trainer's own. Raises ValueError where there is neither max_steps nor max_epochs, for counts
    below 1, and for an engine that cannot be.
    """
    if max_steps == 0 or (max_steps < 0 and max_epochs < 0):
        raise ValueError("the run has no length: set trainer.max_steps or trainer.max_epochs to at least 1")
    counts = {"log_every_n_steps": log_every_n_steps, "accumulate_grad_batches": accumulate_grad_batches}
    counts |= {"val_check_interval": val_check_interval, "threads": 1 if threads is None else threads}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"trainer.{name} must be at least 1; got {value}")
    check_engine(
        strategy,
        precision,
        devices,
        num_nodes,
        gradient_compression=gradient_compression,
        bucket_cap_mb=bucket_cap_mb,
        accumulated=accumulate_grad_batches > 1,
        static_graph=static_graph,
    )
    if precision is not None:  # else a plugin among the options brings it
        check_precision(precision, accelerator)
    check_devices(accelerator, devices)
    if precision == "auto":
        precision, _ = choose_precision(accelerator)
    torch.set_num_threads(default_threads(devices) if threads is None else threads)
    made = Trainer(
        max_steps=max_steps,
        max_epochs=max_epochs,
        val_check_interval=val_check_interval * accumulate_grad_batches,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate_grad_batches,
        log_every_n_steps=log_every_n_steps,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        **engine(
            strategy,
            precision,
            static_graph=static_graph,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
            gradient_compression=gradient_compression,
            reshard_after_forward=reshard_after_forward,
            checkpoint=checkpoint,
        ),
        deterministic=deterministic,
        default_root_dir=run_dir,
        callbacks=[*(callbacks or []), *([Recompute()] if activation_checkpointing else [])],
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks or []),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
    if type(made.strategy.checkpoint_io) is TorchCheckpointIO:
        made.strategy.checkpoint_io = InPlace()
    return made


class Recompute(Callback):
    """trainer.activation_checkpointing=true: before training, the blocks of the model become Recomputed."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        blocks = blocks_of(pl_module.model)  # type: ignore[arg-type]
        if not blocks:
            raise ValueError("trainer.activation_checkpointing=true needs a model with blocks, and this one has none")
        for block in blocks:
            recompute(block)
