"""Dark experience replay++: past samples with the logits that they once had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.learner.learner import Batch, of_stream
from trainkit.learner.replay import Replay


class DarkReplay(Replay):
    """loss = CE(f(x), y) + alpha · mean (f(x_1) - z_1)² + beta · CE(f(x_2), y_2)

    x_1 with the logits z_1, (k, K), and x_2 with the labels y_2 are two draws from the buffer, independent of each
    other (Replay); the mean of squares is over all k K entries. Stored with a sample are its logits in the training
    forward that it came with: in train mode, of its augmented view, never refreshed. They hold what labels do not, how
    alike classes are, and also the state of BatchNorm at that time, and cost K numbers per sample. It replays from the
    second batch on. With alpha=0 or beta=0 that draw and its forward fall away; beta=0 is DER.

    Buzzega et al. 2020, "Dark Experience for General Continual Learning" (arXiv:2004.07211); as in mammoth, whose
    alpha=0.2, beta=0.5 for Split CIFAR-10 with 500 samples are the defaults. task.label_smoothing is not applied.
    """

    def __init__(self, *, alpha: float = 0.2, beta: float = 0.5, **replay: Any):
        super().__init__(**replay)
        for name, value in (("alpha", alpha), ("beta", beta)):
            if value < 0:
                raise ValueError(f"learner.{name} must not be negative; got {value}")
        self.alpha, self.beta = alpha, beta

    def __call__(
        self, model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = of_stream(batch)
        first = self.draw(batch) if self.alpha else []
        second = self.draw(batch) if self.beta else []
        current, *past = self.forwards(model, batch, *first, *second)
        total = F.cross_entropy(current, batch.labels)
        logged = {"current_loss": total}
        if first:
            stored = first[0].logits
            assert stored is not None
            logged["logits_loss"] = F.mse_loss(past[0], stored.to(past[0].dtype))
            total = total + self.alpha * logged["logits_loss"]
        if second:
            logged["replay_loss"] = F.cross_entropy(past[-1], second[0].labels)
            total = total + self.beta * logged["replay_loss"]
        whole = current.detach().isfinite().all(1)  # a logit that is no number would spoil every later draw of it
        self.buffer.add(*(t[whole] for t in (batch.raw, batch.labels, batch.task_ids, current)))
        return total, logged
