"""Image classification."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from trainkit.task.base import Task, wide


class Classification(Task):
    """Cross-entropy over classes. Batches are (images, labels), float (B, C, H, W) and int64 (B,).

    Validation and test report loss (nats) and accuracy over the whole set. `label_smoothing` acts on the training
    loss only.
    """

    def __init__(self, model: nn.Module, *, label_smoothing: float = 0.0, **plugins: Any):
        super().__init__(model, **plugins)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"task.label_smoothing must be at least 0 and below 1; got {label_smoothing}")
        self.label_smoothing = label_smoothing
        names = ("val_loss", "val_accuracy", "test_loss", "test_accuracy")
        self.evaluation = nn.ModuleDict({name: MeanMetric(nan_strategy="disable") for name in names})

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(wide(model(images)), labels, label_smoothing=self.label_smoothing)

    def evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = wide(self.model(images))
        self.evaluation[f"{stage}_loss"].update(F.cross_entropy(logits, labels), weight=labels.numel())
        self.evaluation[f"{stage}_accuracy"].update((logits.argmax(-1) == labels).float())

    def results(self, stage: str) -> dict[str, float]:
        return {name: self.mean(f"{stage}_{name}") for name in ("loss", "accuracy")}
