"""A task small enough to run hundreds of steps in a test, on data whose position is the trainer's step."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torchmetrics import MeanMetric

from trainkit.continual.strategy import Strategy
from trainkit.launch.loggers import JsonlLogger
from trainkit.launch.trainer import trainer as make_trainer
from trainkit.norm.placement import Site
from trainkit.norm.pre import Pre
from trainkit.norm_layer.layer import LayerNorm
from trainkit.report.metrics_file import Row, read
from trainkit.schedule.constant import constant
from trainkit.task.base import Task

WIDTH = 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        placement, site = Pre(LayerNorm), Site("mlp", WIDTH)
        self.attn = placement.around(nn.Linear(WIDTH, WIDTH), site)
        self.mlp = placement.around(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)), site)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Network(nn.Module):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)))


class Toy(Task):
    """Regression; adds `poison` to the loss of step `poison_at`."""

    tokens_per_step = 8

    def __init__(self, *, lr: float = 0.01, poison: float = 0.0, poison_at: int = 0, **changed: Any):
        torch.manual_seed(0)
        plugins: dict[str, Any] = {
            "optimizer": partial(torch.optim.AdamW, lr=lr),
            "schedule": partial(constant, warmup=0),
            "gradient": lambda gradients: {},
            "projection": lambda model: None,
            "strategy": Strategy(),
            "learner": lambda model, batch, loss: (loss(model, batch), {}),
        }
        super().__init__(Network(), **(plugins | changed))
        self.evaluation = nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})
        self.poison, self.poison_at = poison, poison_at

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss = (model(batch).squeeze(-1) - batch.sum(-1)).square().mean()
        return loss * self.poison if model.training and self.step == self.poison_at else loss

    def evaluate(self, stage: str, batch: Tensor) -> None:
        self.evaluation[stage].update(self.loss(self.model, batch))

    def results(self, stage: str) -> dict[str, float]:
        return {"loss": self.mean(stage)}


class Batches:
    """Batch n of the run is drawn from seed n; one pass goes from the trainer's position to the end of its epoch."""

    def __init__(self, length: int, trainer: Trainer | None = None):
        self.length, self.trainer = length, trainer

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches if self.trainer else 0
        for number in range(done, done - done % self.length + self.length):
            yield torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(number))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The trainer's step says it all; having this method tells Lightning that the loader can be resumed."""


class ToyData(LightningDataModule):
    def __init__(self, length: int = 1000):
        super().__init__()
        self.length = length

    def train_dataloader(self) -> Batches:
        return Batches(self.length, self.trainer)

    def val_dataloader(self) -> Batches:
        return Batches(2)

    def test_dataloader(self) -> Batches:
        return Batches(1)


def fit(
    folder: Path,
    callbacks: list[Any],
    *,
    task: Task | None = None,
    length: int = 1000,
    checkpoint: Path | None = None,
    loggers: list[Any] | None = None,
    **options: Any,
) -> tuple[Trainer, Task]:
    """A run in `folder`: 12 steps, validated every 4th and logged every 2nd, unless `options` say otherwise."""
    options = {
        "max_steps": 12,
        "val_check_interval": 4,
        "log_every_n_steps": 2,
        "accelerator": "cpu",
        "threads": 1,
    } | options
    torch.manual_seed(1)
    trainer = make_trainer(run_dir=folder, callbacks=callbacks, **options)
    trainer.loggers = [JsonlLogger(folder), *(loggers or [])]
    task = task or Toy()
    trainer.fit(task, datamodule=ToyData(length), ckpt_path=checkpoint, weights_only=True)
    return trainer, task


def rows(folder: Path, name: str = "train/loss") -> list[Row]:
    """What was logged, as far as it holds `name`."""
    return [row for row in read(folder / "metrics.jsonl") if name in row]
