"""Prediction distillation: on the new data, the answers about old classes stay those of the old network."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.learner.regularizer import Forward, Regularizer

FORMS = ("kl", "bce")


class PredictionDistillation(Regularizer):
    """loss = CE(over new classes) + weight · distance(z, z*),  z, z*: (B, old classes), logits now and after last task

        form="kl"    T² · mean_i KL( softmax(z*_i / T) || softmax(z_i / T) )
        form="bce"   mean_i Σ_c  - s*_ic log s_ic - (1 - s*_ic) log(1 - s_ic),   s = sigmoid(z)     (LwF.MC)

    i runs over the batch, c over the classes of finished tasks. The factor T² keeps the gradient's size the same for
    every temperature. bce holds each logit, kl their differences only.
    Smith et al. 2022 (arXiv:2203.17269), who find that it is what makes penalties on parameters work when classes
    accumulate. No official code was found: the definitions are the generic ones, the values ours. lwf has the
    cross-entropy form.
    """

    name = "pred_kd"
    wants = frozenset({"logits"})

    def __init__(
        self,
        *,
        weight: float = 1.0,
        form: Literal["kl", "bce"] = "kl",
        temperature: float = 2.0,
        classes: Literal["all", "seen", "new"] = "new",
    ):
        super().__init__(weight=weight, classes=classes)
        if form not in FORMS:
            raise ValueError(f"learner.form must be one of {', '.join(FORMS)}; got {form!r}")
        if temperature <= 0:
            raise ValueError(f"learner.temperature must be above 0; got {temperature}")
        self.form, self.temperature = form, temperature

    def distance(self, model: nn.Module, forward: Forward) -> Tensor:
        assert forward.old_logits is not None
        new, old = forward.logits[:, forward.old], forward.old_logits[:, forward.old]
        if self.form == "bce":
            return F.binary_cross_entropy_with_logits(new, old.sigmoid(), reduction="sum") / len(new)
        new, old = ((z / self.temperature).log_softmax(1) for z in (new, old))
        return self.temperature**2 * F.kl_div(new, old, reduction="batchmean", log_target=True)
