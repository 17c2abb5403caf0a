"""Normalised gradient descent for classification: steps divided by the mean probability of error (arXiv:2412.08424)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FORMS = ("gd", "normalized", "perceptron")


class NormalizedGD:
    """A step of plain SGD on the loss given here moves a linear model θ, with learning rate γ, by

        form=gd            γ (1/n) Σ p_i y_i x_i          gradient descent on the logistic loss
        form=normalized    γ Σ p_i y_i x_i / Σ p_i        the same divided by the mean of p
        form=perceptron    γ (1/n) Σ q_i y_i x_i          the batch perceptron, the limit of gd for large γ

    x_i: (features,), y_i = ±1, p_i = 1 / (1 + exp(m_i)) with the margin m_i = y_i x_iᵀθ is the probability given to
    the wrong class; q_i is 1 where m_i < 0, 1/2 where m_i = 0, else 0. As p vanishes on separable data, so do the steps
    of gd; the normalised ones are averages of the y_i x_i and keep their length. State: none. Any further model and
    more classes work alike: m_i is the logit of the right class minus the log-sum-exp of the others, and y_i x_i the
    gradient of m_i. A single logit is that of class 1 against class 0.

    "From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes" (2024,
    arXiv:2412.08424), where the methods are for full batches of linear models. The normalised form is RECONSTRUCTED
    from the abstract, not checked against the paper's text; for mini-batches, networks and several classes it is our
    extension. The formulas are exact with optimizer=sgd optimizer.momentum=0 gradient=none and one batch per step:
    batches that are accumulated, or of several ranks, are each normalised by themselves and then averaged. The loss
    that is logged is the mean cross-entropy under every form; task.label_smoothing is not applied.
    """

    def __init__(self, form: Literal["gd", "normalized", "perceptron"] = "normalized"):
        if form not in FORMS:
            raise ValueError(f"learner.form must be one of {', '.join(FORMS)}; got {form!r}")
        self.form = form

    def __call__(
        self, model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A loss whose value is the cross-entropy of the batch (x, labels) and whose gradient is the form's step."""
        x, labels = batch
        m = margins(model(x), labels)
        objective = self.objective(m)
        value = F.softplus(-m).mean()
        return objective + (value - objective).detach(), {"error_probability": torch.sigmoid(-m).mean()}

    def objective(self, m: Tensor) -> Tensor:
        """What is descended on, 0-d; m: (n,)."""
        if self.form == "gd":
            return F.softplus(-m).mean()
        if self.form == "perceptron":
            return (m.abs() - m).mean() / 2  # the derivative of |m| is 0 at a tie
        # A softmax of log p, since where all margins are large every p underflows and their sum divides by zero.
        return -torch.softmax(F.logsigmoid(-m.detach()), 0) @ m


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,): how far the right class leads; logits: (n, classes) or (n, 1), labels: (n,). In at least float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.shape[-1] == 1:
        return torch.where(labels.bool(), logits.squeeze(-1), -logits.squeeze(-1))
    own = labels.long().unsqueeze(-1)
    return logits.gather(-1, own).squeeze(-1) - logits.scatter(-1, own, -torch.inf).logsumexp(-1)
