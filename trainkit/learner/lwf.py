"""Learning without forgetting: the new data also teach what the old network says about them."""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.learner.regularizer import Forward, Regularizer


class LearningWithoutForgetting(Regularizer):
    """loss = CE(over seen classes) - weight · mean Σ_{c old} q*_c log q_c

        q = p^(1/T) / Σ_{u old} p_u^(1/T),  p = softmax of the old classes' logits;  q* likewise of the old network

    which is q = softmax(z_old / T). mean: over the batch; T: temperature. Needs no past data, and a forward of the old
    network per batch.

    Li and Hoiem 2016 (arXiv:1606.09282). As in mammoth (weight 0.5, T = 2, no factor T²), but for two things: there the
    old network's logits are those of the images without augmentation, recorded at the task's start; here it sees the
    view that the new one sees, and none are stored. And there the head is first trained alone for as many epochs as
    the task has; here it is not.
    """

    name = "lwf"
    wants = frozenset({"logits"})

    def __init__(
        self,
        *,
        weight: float = 0.5,
        temperature: float = 2.0,
        classes: Literal["all", "seen", "new"] = "seen",
    ):
        super().__init__(weight=weight, classes=classes)
        if temperature <= 0:
            raise ValueError(f"learner.temperature must be above 0; got {temperature}")
        self.temperature = temperature

    def distance(self, model: nn.Module, forward: Forward) -> Tensor:
        assert forward.old_logits is not None
        taught = (forward.old_logits[:, forward.old] / self.temperature).softmax(1)
        return F.cross_entropy(forward.logits[:, forward.old] / self.temperature, taught)
