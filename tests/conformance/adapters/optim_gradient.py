"""Optimizers that take two gradients per step, and treatments of the gradient that need more than the gradient."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.optimizer.partition import by_role, split

from ...menu import build as from_menu
from ..registry import File, Pairs, Steps, adapter, build, optimizer

# What torch takes for settings that a file does not name.
TORCH: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.0, "weight_decay": 0.0},
    "AdamW": {"betas": [0.9, 0.999], "weight_decay": 0.01},
    "Adam": {"betas": [0.9, 0.999], "weight_decay": 0.0},
}
EVERY_ROLE = {"decay": ["matrix", "vector"]}
OF_THE_HOOK = (
    *("lr_update_interval", "lr_update_start_iter", "lr_update_stop_iter", "momentum", "use_adam", "grad_clip"),
    *("grad_clip_iter_range", "warmup_iters", "debug_mode"),  # the last two without effect
)


def base(name: str, settings: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The word for torch's optimizer of that name, and all of its settings; Adam without decay is AdamW without."""
    assert name != "Adam" or not settings.get("weight_decay"), "Adam with L2 is not in the menu"
    return {"SGD": "sgd"}.get(name, "adamw"), {**TORCH[name], **settings, **EVERY_ROLE}


@adapter("SAM", "ASAM (element-wise)")
def sam(file: File) -> Pairs:
    given = file.hyperparameters
    chosen, settings = base(given["base"], given["base_hp"])
    own = {"rho": given["rho"], "adaptive": given["adaptive"]}
    words = [
        *(f"optimizer={'asam' if given['adaptive'] else 'sam'}", f"optimizer/base={chosen}"),
        *(f"optimizer.{key}={value}" for key, value in own.items()),
        *(f"optimizer.base.{key}={value}" for key, value in settings.items()),
    ]
    factory, options = split(from_menu("optimizer", *words))
    model = nn.Module()
    for name in file.names("init"):
        model.register_parameter(name, nn.Parameter(file[f"init/{name}"]))
    stepping = by_role(model, factory, **options)
    for step in range(1, int(file.steps) + 1):
        passes = TwoPasses(model, file, step)
        stepping.step(passes)
        for name, parameter in model.named_parameters():
            yield f"perturbed/{step}/{name}", passes.perturbed[name]
            yield f"expect/{step}/{name}", parameter


class TwoPasses:
    """The closure of a step: sets the file's gradient at the weights, then at the perturbed ones, which it notes."""

    def __init__(self, model: nn.Module, file: File, step: int):
        self.model, self.file, self.step = model, file, step
        self.gradients = iter(("grad", "grad2"))
        self.perturbed: dict[str, Tensor] = {}

    def __call__(self) -> Tensor:
        which = next(self.gradients)
        for name, parameter in self.model.named_parameters():
            self.perturbed[name] = parameter.detach().clone()
            parameter.grad = self.file[f"{which}/{self.step}/{name}"]
        return torch.zeros(())


@adapter("AGVM")
def agvm(file: File) -> Steps:
    given, hook = file.hyperparameters, file.hyperparameters["hook"]
    unknown = [key for key in hook if key not in OF_THE_HOOK]
    assert not unknown, f"settings of the hook without a key here: {unknown}"
    start, stop = hook.get("lr_update_start_iter", 500), hook.get("lr_update_stop_iter", -1)
    clip = hook.get("grad_clip")
    treatment = build(
        "gradient",
        "agvm",
        {
            "interval": hook.get("lr_update_interval", 5),
            "start": start,
            "stop": stop if stop > start else None,
            "momentum": hook.get("momentum", 0.97),
            "adam": hook.get("use_adam", False),
            "modules": file.meta["groups"],
            "max_norm": clip["max_norm"] if clip else None,
            "clip_steps": hook.get("grad_clip_iter_range"),
        },
    )
    chosen, settings = base(given["optimizer"], {**given["opt"], "lr": given["lr"]})
    make = optimizer(chosen, settings)

    def prepared(model: nn.Module) -> Optimizer:
        stepping = make(model)
        treatment.prepare(model, stepping)
        return stepping

    def treat(model: nn.Module, stepping: Optimizer, step: int) -> None:
        names = [name for name, _ in model.named_parameters()]
        if treatment.begin_step(step):
            treatment.first_half([file[f"grad_a/{step}/{name}"] for name in names], 0.5)
        treatment([parameter.grad for parameter in model.parameters()])

    def scales(model: nn.Module, stepping: Optimizer, step: int) -> Iterable[tuple[str, Any]]:
        yield f"scale_factors/{step}", treatment.scales

    return Steps(prepared, before=treat, after=scales)
