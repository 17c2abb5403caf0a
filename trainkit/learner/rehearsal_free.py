"""Sums of distances to what was learned before: prediction and feature distillation, penalties on parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn

from trainkit.continual.strategy import Strategy
from trainkit.learner.ewc import ElasticWeightConsolidation
from trainkit.learner.feat_kd import FeatureDistillation
from trainkit.learner.l2 import L2
from trainkit.learner.learner import Batch, Stream
from trainkit.learner.lwf import LearningWithoutForgetting
from trainkit.learner.pred_kd import PredictionDistillation
from trainkit.learner.regularizer import Forward, Regularizer

TERMS: dict[str, Callable[..., Regularizer]] = {
    "pred_kd": PredictionDistillation,
    "feat_kd": FeatureDistillation,
    "lwf": LearningWithoutForgetting,
    "ewc": ElasticWeightConsolidation,
    "l2": L2,
}


class RehearsalFree(Regularizer):
    """loss = CE(over `classes`) + Σ_terms weight_k · distance_k

    Each term is named as the learner that it is by itself, and takes the same settings but `classes`; those of weight 0
    are left out and cost nothing. All share one copy of the old network and one forward of it per batch.
    Smith et al. 2022 (arXiv:2203.17269): prediction distillation plus a penalty on parameters; either alone is much
    weaker when classes accumulate. No official code was found, so the weights are ours, not theirs.
    """

    name = "rehearsal_free"

    def __init__(
        self,
        *,
        classes: Literal["all", "seen", "new"] = "new",
        pred_kd: Mapping[str, Any] | None = None,
        feat_kd: Mapping[str, Any] | None = None,
        lwf: Mapping[str, Any] | None = None,
        ewc: Mapping[str, Any] | None = None,
        l2: Mapping[str, Any] | None = None,
    ):
        super().__init__(classes=classes)
        settings = {"pred_kd": pred_kd, "feat_kd": feat_kd, "lwf": lwf, "ewc": ewc, "l2": l2}
        built = {name: TERMS[name](**given) for name, given in settings.items() if given is not None}
        self.terms = {name: term for name, term in built.items() if term.weight}
        if not self.terms:
            raise ValueError(
                f"learner=rehearsal_free has no term: set the weight of one of {', '.join(TERMS)}, such as "
                "learner.pred_kd.weight=1. learner=finetune trains without any"
            )
        self.wants = frozenset().union(*(term.wants for term in self.terms.values()))

    def begin(self, stream: Stream, strategy: Strategy) -> None:
        super().begin(stream, strategy)
        for term in self.terms.values():
            term.begin(stream, strategy)

    def distances(self, model: nn.Module, forward: Forward) -> dict[str, Tensor]:
        return {name: d for term in self.terms.values() for name, d in term.distances(model, forward).items()}

    def remember(self, model: nn.Module, batches: Iterable[Batch], competing: Callable[[Tensor], Tensor]) -> None:
        for term in self.terms.values():
            term.remember(model, batches, competing)

    def memory(self) -> dict[str, Any]:
        return {name: term.memory() for name, term in self.terms.items()}

    def load_memory(self, memory: dict[str, Any]) -> None:
        """ValueError where the state is that of other terms."""
        if set(memory) != set(self.terms):
            raise ValueError(
                f"the checkpoint's terms are {', '.join(memory)}, this run's are {', '.join(self.terms)}: keep which "
                "weights of the learner are 0, or start a new run"
            )
        for name, term in self.terms.items():
            term.load_memory(memory[name])
