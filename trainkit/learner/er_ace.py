"""Experience replay with an asymmetric cross-entropy: new samples do not push the old classes down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.learner.learner import Batch, of_stream
from trainkit.learner.replay import Replay

FORMS = ("adab2n", "mammoth")


class AsymmetricReplay(Replay):
    """loss = CE(f(x) over the allowed classes, y) + CE(f(x_M), y_M), x_M a draw from the buffer (Replay).

        allowed(c) = c occurs among the current labels, or c >= m

    with m the largest class index seen so far, those of the current batch included, so m itself is allowed. Old classes
    that a batch does not hold get no gradient from it: their logits are taught by the replayed samples alone, which
    have both kinds. Mask and replay begin with the second task; in the first, samples are only stored.

    Caccia et al. 2022, "New Insights on Reducing Abrupt Representation Change in Online Continual Learning"
    (arXiv:2104.05025).
    form: two codes differ. "adab2n" (the fork that AdaB2N is published with): classes above m are added only while
    m < K - 1, K being the number of classes; the others get the smallest number of the dtype. "mammoth" (its main
    branch): they are always added, so class K - 1 stays allowed to the end; the others get -1e9. Its cosine head is a
    matter of the model and not built here.
    task_free: replay from the second batch on, as mammoth can; the mask still waits for the second task.
    m is the rank's own, like the buffer. task.label_smoothing is not applied.
    """

    def __init__(self, *, form: Literal["adab2n", "mammoth"] = "adab2n", task_free: bool = False, **replay: Any):
        super().__init__(**replay)
        if form not in FORMS:
            raise ValueError(f"learner.form must be one of {', '.join(FORMS)}; got {form!r}")
        self.form, self.task_free = form, task_free
        self.highest = torch.tensor(-1)  # m; on the batches' device, which is not waited for

    def __call__(
        self, model: nn.Module, batch: Batch, loss: Callable[[nn.Module, Any], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        batch = of_stream(batch)
        self.see(batch.labels)
        later = self.task > 0
        replayed = self.draw(batch) if later or self.task_free else []
        current, *past = self.forwards(model, batch, *replayed)
        if later:
            current = current.masked_fill(~self.allowed(batch.labels, current.shape[1]), self.least(current.dtype))
        total = F.cross_entropy(current, batch.labels)
        logged = {"current_loss": total}
        if past:
            logged["replay_loss"] = F.cross_entropy(past[0], replayed[0].labels)
            total = total + logged["replay_loss"]
        self.buffer.add(batch.raw, batch.labels, batch.task_ids)
        return total, logged

    def see(self, labels: Tensor) -> None:
        """Counts labels as seen; (n,), n may be 0."""
        self.highest = torch.cat([self.highest.to(labels.device).view(1), labels]).amax()

    def allowed(self, labels: Tensor, classes: int) -> Tensor:
        """(classes,), bool: which of the columns a batch with these labels competes with."""
        columns = torch.arange(classes, device=labels.device)
        beyond = columns >= self.highest
        if self.form == "adab2n":
            beyond &= self.highest < classes - 1
        return beyond.index_fill(0, labels, True)

    def least(self, dtype: torch.dtype) -> float:
        return torch.finfo(dtype).min if self.form == "adab2n" else -1e9

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"highest": int(self.highest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.highest = torch.tensor(state["highest"])
