"""What learners that replay past samples share: their buffer, the draws from it, and the forwards of a step."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainkit.continual.strategy import Strategy
from trainkit.learner.buffer import Buffer, Reservoir, Ring
from trainkit.learner.learner import Batch, Learner, Stream

BUFFERS: dict[str, type[Buffer]] = {"reservoir": Reservoir, "ring": Ring}
FORWARDS = ("joint", "separate")


class Sample(NamedTuple):
    """Samples drawn from a buffer, augmented anew; logits: those stored with them, if any were."""

    x: Tensor
    labels: Tensor
    task_ids: Tensor
    logits: Tensor | None


class Replay(Learner):
    """A learner with a buffer.

    forward: what the layers that look at a whole batch, such as BatchNorm, see in a step. "joint": one forward of the
    current samples and all replayed ones, whose logits are then parted: one set of batch statistics over old and new
    tasks, and one update of the running ones. "separate": one forward of each, as mammoth does for ER-ACE and DER++:
    statistics of their own, two or three running updates per step, and the last one decides most. Without layers of
    that kind both are the same. A strategy that weighs tasks within a batch, such as AdaB2N, needs "joint", which is
    the default of every learner, so that continual=none,adab2n differ in nothing else; the published baselines of
    ER-ACE and DER++ are learner.forward=separate.
    replay_batch: samples per draw, for each micro-batch of each rank; None: as many as that micro-batch has, so that
    the shares of old and new do not depend on how a step is divided. Buffers take a micro-batch after its forward,
    after the draws, whether or not the optimizer takes the step.
    """

    remembers_batches = True

    def __init__(
        self,
        *,
        buffer: Literal["reservoir", "ring"] = "reservoir",
        buffer_size: int = 500,
        replay_batch: int | None = None,
        forward: Literal["joint", "separate"] = "joint",
    ):
        if buffer not in BUFFERS:
            raise ValueError(f"learner.buffer must be one of {', '.join(BUFFERS)}; got {buffer!r}")
        if forward not in FORWARDS:
            raise ValueError(f"learner.forward must be one of {', '.join(FORWARDS)}; got {forward!r}")
        if buffer_size < 1:
            raise ValueError(
                f"learner.buffer_size must be at least 1, as this learner replays; got {buffer_size}. "
                "learner=finetune trains without a buffer"
            )
        if replay_batch is not None and replay_batch < 1:
            raise ValueError(f"learner.replay_batch must be at least 1, or null; got {replay_batch}")
        self.kind, self.buffer_size, self.replay_batch, self.forward = buffer, buffer_size, replay_batch, forward
        self.task = 0

    def begin(self, stream: Stream, strategy: Strategy) -> None:
        super().begin(stream, strategy)
        self.buffer = BUFFERS[self.kind](self.buffer_size, stream)

    def begin_task(self, model: nn.Module, task: int) -> None:
        self.task = task

    def draw(self, batch: Batch) -> list[Sample]:
        """A list of one draw to be replayed beside `batch`; of none while the buffer is empty."""
        if not len(self.buffer):
            return []
        items = self.buffer.draw(self.replay_batch or len(batch.labels))
        x = self.stream.transform(items.raw.to(batch.x.device), self.buffer.generator)
        labels, task_ids = items.labels.to(x.device), items.task_ids.to(x.device)
        logits = None if items.logits is None else items.logits.to(x.device)
        return [Sample(x.to(batch.x.dtype), labels, task_ids, logits)]

    def forwards(self, model: nn.Module, *parts: Batch | Sample) -> list[Tensor]:
        """The logits of each part, by one training forward of all of them or by one of each."""
        if self.forward == "separate":
            return [self.logits(model, part.x, part.task_ids) for part in parts]
        x, task_ids = torch.cat([part.x for part in parts]), torch.cat([part.task_ids for part in parts])
        return list(self.logits(model, x, task_ids).split([len(part.x) for part in parts]))

    def state_dict(self) -> dict[str, Any]:
        return {"task": self.task, "buffer": self.buffer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.task = state["task"]
        self.buffer.load_state_dict(state["buffer"])
