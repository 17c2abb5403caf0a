"""Language modelling: predict the next token."""

from __future__ import annotations

from math import exp, log
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from trainkit.model.parts.generate import looking
from trainkit.model.parts.token_loss import token_loss
from trainkit.task.base import Task


class LanguageModeling(Task):
    """Cross-entropy of the next token. Batches are (inputs, targets), both int64 (B, T); losses are nats per token.

    Validation and test report, over a fixed set: loss; perplexity = exp(loss); and bits per byte = loss / ln 2 /
    bytes_per_token, which stays comparable between tokenizers, and is left out where bytes_per_token is not known.
    """

    def __init__(self, model: nn.Module, *, context: int, bytes_per_token: float | None, **plugins: Any):
        super().__init__(model, **plugins)
        limit = getattr(model, "context", context)
        if context > limit:
            raise ValueError(f"data.context={context} is longer than the model reads; try model.context={context}")
        self.bytes_per_token = bytes_per_token
        self.evaluation = nn.ModuleDict({stage: MeanMetric(nan_strategy="disable") for stage in ("val", "test")})

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        if getattr(model, "gives_loss", False):  # and need not hold all logits for it
            return model(inputs, targets)
        return token_loss(model(inputs), targets)

    def on_fit_start(self) -> None:
        leaking = sorted({type(m).__name__ for m in self.model.modules() if getattr(m, "leaks", False)})
        lasting = looking(self.model)
        if leaking:
            rank_zero_warn(
                f"{', '.join(leaking)} in a causal model leaks the future: in training its statistics run over the "
                "sequence, so each position sees later ones and the training loss is too good. Evaluation, "
                + ("with running statistics, does not leak." if not lasting else f"by {', '.join(lasting)}, leaks too.")
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        if self.tokens_per_step is None:
            inputs = batch[0]
            self.tokens_per_step = inputs.numel() * self.trainer.accumulate_grad_batches * self.trainer.world_size
            if hasattr(self.model, "flops_per_token"):
                self.flops_per_token = self.model.flops_per_token(inputs.shape[1])  # type: ignore[operator]

    def evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        self.evaluation[stage].update(self.loss(self.model, batch), weight=batch[1].numel())

    def results(self, stage: str) -> dict[str, float]:
        loss = self.mean(stage)
        results = {"loss": loss, "perplexity": _exp(loss)}
        return results | ({"bits_per_byte": loss / log(2) / self.bytes_per_token} if self.bytes_per_token else {})


def _exp(loss: float) -> float:
    return exp(loss) if loss < 700 else float("inf")
