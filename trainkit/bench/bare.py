"""The same model, data, optimizer, clip and schedule as a run's, in a loop of plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.optim.lr_scheduler import LambdaLR

from trainkit.data.loader import TrainLoader
from trainkit.launch.job import build_task
from trainkit.optimizer.partition import by_role, split


class Bare:
    """One optimizer step per call, in float32; what a user would write who wants nothing but the step."""

    def __init__(self, cfg: Any, data: LightningDataModule, *, steps: int, device: torch.device | str = "cpu"):
        self.task = build_task(cfg).to(device)
        self.model, self.device = self.task.model, torch.device(device)
        factory, words = split(self.task.optimizer_factory)
        self.optimizer = by_role(self.model, factory, **words)
        made = self.task.schedule
        schedule = made.func(**{**made.keywords, "total": steps}) if isinstance(made, partial) else made
        self.schedule = LambdaLR(self.optimizer, schedule)
        self.parameters = list(self.model.parameters())
        self.batches = batches(data)

    def __call__(self) -> None:
        batch = [part.to(self.device, non_blocking=True) for part in next(self.batches)]
        loss = self.task.loss(self.model, batch)
        loss.backward()
        self.task.gradient([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def batches(data: LightningDataModule) -> Iterator[Any]:
    """A run's own training batches in their order, again and again; from a loader of its own."""
    loader = data.train_dataloader()
    assert isinstance(loader, TrainLoader)
    again = TrainLoader(loader.source, loader.share, seed=loader.seed)
    while True:
        yield from again
