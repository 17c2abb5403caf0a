"""Experience replay: past samples beside the new ones, all of the same weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.learner.learner import Batch, of_stream
from trainkit.learner.replay import Replay


class ExperienceReplay(Replay):
    """loss = mean cross-entropy over the union of the current batch and a draw from the buffer (Replay).

    It replays from the second batch on. Simple and strong; what it costs is the buffer and a batch of twice the size.
    The new classes, of which a batch holds many, still push down the logits of the old ones: see er_ace.
    Chaudhry et al. 2019, "On Tiny Episodic Memories in Continual Learning" (arXiv:1902.10486); as in mammoth. The
    cross-entropy is over all classes; task.label_smoothing is not applied.
    """

    def __call__(
        self, model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = of_stream(batch)
        parts = [batch, *self.draw(batch)]
        logits = self.forwards(model, *parts)
        losses = [F.cross_entropy(z, part.labels) for z, part in zip(logits, parts, strict=True)]
        union = F.cross_entropy(torch.cat(logits), torch.cat([part.labels for part in parts]))
        self.buffer.add(batch.raw, batch.labels, batch.task_ids)
        return union, dict(zip(("current_loss", "replay_loss"), losses, strict=False))
