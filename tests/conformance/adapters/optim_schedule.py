"""Schedules made from gradient norms, and gradient descent on the logistic loss."""

import torch
from torch import nn

from trainkit.schedule.refined import closed_form, median_filter, refine

from ..registry import File, Pairs, adapter, build, optimizer


@adapter("schedule refinement (closed form)")
def refined_schedule(file: File) -> Pairs:
    tau = file.hyperparameters["tau"]
    for run in [name.removesuffix("/grad_norms") for name in file.unused(set()) if name.endswith("/grad_norms")]:
        norms = file[f"{run}/grad_norms"].tolist()
        filtered = median_filter(norms, tau)
        yield f"{run}/filtered", filtered
        for norm in ("l1", "l2"):
            yield f"{run}/schedule_{norm}_raw", closed_form(filtered, norm=norm)
            yield f"{run}/schedule_{norm}", refine(norms, norm=norm, tau=tau)


@adapter("LR+GD, normalised LR+GD, batch perceptron")
def normalized_gd(file: File) -> Pairs:
    """A linear model with one logit, its labels 0 and 1; the trajectory from the first weights on."""
    data = file["X"], file["y"] > 0
    start = torch.as_tensor(file.hyperparameters["theta0"], dtype=file.dtype)
    for form in ("gd", "normalized", "perceptron"):
        learner = build("learner", "normalized_gd", {"form": form})
        model = nn.Linear(data[0].size(1), 1, bias=False)
        model.weight.data.copy_(start)
        descent = optimizer("sgd", {"lr": file.hyperparameters["gamma"], "momentum": 0.0})(model)
        trajectory = [model.weight.detach().clone()]
        for _ in range(file.hyperparameters["steps"]):
            descent.zero_grad()
            loss, _ = learner(model, data)
            loss.backward()
            descent.step()
            trajectory.append(model.weight.detach().clone())
        yield form, torch.cat(trajectory)
