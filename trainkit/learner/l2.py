"""L2 towards the last task's weights: all parameters are held where they were, alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn

from trainkit.learner.learner import Batch
from trainkit.learner.regularizer import Forward, Regularizer, chosen, moved, wide


class L2(Regularizer):
    """loss = CE + weight · Σ_j (θ_j - θ*_j)²,  θ*: the weights after the previous task

    Elastic weight consolidation with F = 1: one copy of the parameters, no pass over the finished task.
    only="attn": just the attention blocks of a vision transformer, which with a pre-trained one is what did best.
    Smith et al. 2022 (arXiv:2203.17269), where the cross-entropy is over the new classes. No official code was found,
    so the weight is ours, not theirs.
    """

    name = "l2"

    def __init__(
        self,
        *,
        weight: float = 0.1,
        only: str | None = None,
        classes: Literal["all", "seen", "new"] = "new",
    ):
        super().__init__(weight=weight, classes=classes)
        self.only = only
        self.anchor: dict[str, Tensor] = {}

    def distance(self, model: nn.Module, forward: Forward) -> Tensor:
        return moved(model, self.anchor)

    def remember(self, model: nn.Module, batches: Iterable[Batch], competing: Callable[[Tensor], Tensor]) -> None:
        self.anchor = {name: wide(p.detach()).clone() for name, p in chosen(model, self.only).items()}

    def memory(self) -> dict[str, Any]:
        return {"anchor": dict(self.anchor)}

    def load_memory(self, memory: dict[str, Any]) -> None:
        self.anchor = dict(memory["anchor"])
