"""The Lightning Trainer as trainkit uses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from trainkit.launch.machine import default_threads


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
    precision: str = "32-true",
    deterministic: bool = False,
    run_dir: Path | None = None,
    callbacks: Any = None,
    **options: Any,
) -> Trainer:
    """lightning.Trainer with what is ours switched off there: logging, checkpoints, progress, samplers, clipping.

    Loggers are set on it later, when the run's directory exists.
    `val_check_interval` counts optimizer steps, over epochs. `threads` are the intra-op threads of each process; null
    divides the cores among this machine's ranks. Everything else is the Trainer's own. Raises ValueError where there
    is neither max_steps nor max_epochs, and for counts below 1.
    """
    if max_steps == 0 or (max_steps < 0 and max_epochs < 0):
        raise ValueError("the run has no length: set trainer.max_steps or trainer.max_epochs to at least 1")
    counts = {"log_every_n_steps": log_every_n_steps, "accumulate_grad_batches": accumulate_grad_batches}
    counts |= {"val_check_interval": val_check_interval, "threads": 1 if threads is None else threads}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"trainer.{name} must be at least 1; got {value}")
    torch.set_num_threads(default_threads(devices) if threads is None else threads)
    return Trainer(
        max_steps=max_steps,
        max_epochs=max_epochs,
        val_check_interval=val_check_interval * accumulate_grad_batches,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate_grad_batches,
        log_every_n_steps=log_every_n_steps,
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        deterministic=deterministic,
        default_root_dir=run_dir,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks or []),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **options,
    )
