"""Projections: the maps on singular values, Muon under a spectral constraint, and normalize-and-project."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.projection import spectral
from trainkit.projection.nap import lengths

from ..registry import File, Pairs, Steps, adapter, build, optimizer

PROJECTIONS = {
    "svd_clip": "svd_clip",
    "pure_svd": "svd_clip",
    "spec_hammer": "spectral_hammer",
    "spec_normalize": "spectral_normalize",
    "spec_wd": "spectral_decay",
}


@adapter("spectral weight constraints")
def caps(file: File) -> Pairs:
    options = {"iterations": file.hyperparameters["power_iterations"]}
    for name in file.meta["params"]:
        m, soft = file[f"{name}/M"], file[f"{name}/soft_cap_in"]
        file[f"{name}/singular_values"]  # a remark on M
        yield f"{name}/orthogonalize6", spectral.orthogonalize(m)
        yield f"{name}/hard_cap", spectral.hard_cap(m)
        for alpha in file.names(f"{name}/soft_cap"):
            yield f"{name}/soft_cap/{alpha}", spectral.soft_cap(soft, float(alpha))
        for w_max in file.names(f"{name}/svd_clip"):
            yield f"{name}/svd_clip/{w_max}", spectral.svd_clip(m, float(w_max))
        for w_max in file.names(f"{name}/spectral_hammer"):
            yield f"{name}/spectral_hammer/{w_max}", spectral.spectral_hammer(m, float(w_max), **options)
        for rate in file.names(f"{name}/spectral_weight_decay"):
            yield f"{name}/spectral_weight_decay/{rate}", spectral.spectral_decay(m, float(rate), **options)
        yield f"{name}/spectral_normalize", spectral.spectral_normalize(m, **options)
        for kind in file.names(name):
            words, _, inflation = kind.partition("_infl")
            cap = {"embed_project_cols": {"axis": -2}, "unembed_project_rows": {"axis": -1}}.get(words)
            if cap:
                yield f"{name}/{kind}", spectral.rms_cap(m, **cap, inflation=float(inflation or 1))
    rows = [
        [w_max, decay, update, spectral.released_coupling(w_max, decay, update)]
        for w_max, decay, update, _ in file["soft_cap_coupling"].tolist()
    ]
    yield "soft_cap_coupling", torch.tensor(rows)


@adapter("Muon with enforced spectral constraint")
def constrained(file: File) -> Steps:
    hyper = file.hyperparameters
    name = PROJECTIONS.get(hyper["project"], hyper["project"])
    bounds = {"w_max": hyper["w_max"], "sensitive_to_wmax": hyper["sensitive_to_wmax"]}
    own = {"soft_cap": {**bounds, "coupling": "released"}, "spectral_decay": {}}.get(name, bounds)
    projection = build("projection", name, {**own, "start": "keep"})
    muon = {"lr": hyper["lr"], "momentum": hyper["beta1"], "weight_decay": hyper["wd"], "nesterov": False}
    muon |= {"steps": len(spectral.SIX), "coefficients": [list(triple) for triple in spectral.SIX], "eps": 1e-12}

    def make(model: nn.Module) -> Optimizer:
        layers = nn.ModuleList(linear(parameter) for parameter in model.parameters())
        made = optimizer("muon", {**muon, "scale": "ratio"})(model)
        projection.prepare(made)
        projection(layers)
        made.register_step_post_hook(lambda *_: projection(layers))
        return made

    return Steps(make)


def linear(weight: nn.Parameter) -> nn.Linear:
    """The layer that a bare matrix stands for."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = weight
    return layer


@adapter("NaP (normalize-and-project)")
def nap(file: File) -> Pairs:
    hyper = file.hyperparameters
    model = network(file)
    names = {f"{'b' if kind == 'bias' else 'W'}{i}": p for i, kind, p in parameters_of(model.linears)}
    names |= {f"{'offset' if kind.endswith('bias') else 'scale'}{i}": p for i, kind, p in parameters_of(model.norms)}
    parameters = {name: names[name] for name in file.names("param")}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(file[f"param/{name}"])
    settings = {key: hyper[key] for key in ("project_every", "project_output", "affine", "reg_to_init")}
    settings["affine"] = {"reg_to_init": "to_init"}.get(hyper["affine"], hyper["affine"])
    projection = build("projection", "nap", settings)
    stepper = optimize(hyper)(model)
    projection.prepare(stepper)
    projection(model)
    for name in file.names("extra/init_norm"):
        yield f"extra/init_norm/{name}", projection.norms[f"linears.{name[1:]}.weight"]
    for step in range(1, int(file.steps) + 1):
        stepper.zero_grad()
        y = model(file[f"x/{step}"])
        loss, penalty = nn.CrossEntropyLoss()(y, file[f"label/{step}"]), projection.penalty(model)
        torch.autograd.backward([loss, penalty] if isinstance(penalty, Tensor) else [loss])
        yield f"expect/y/{step}", y
        yield f"expect/loss/{step}", loss
        for name, parameter in parameters.items():
            yield f"expect/gparam/{step}/{name}", parameter.grad
        stepper.step()
        projection(model)
        for name, parameter in parameters.items():
            yield f"expect/param/{step}/{name}", parameter
        for name in file.names(f"expect/norm/{step}"):
            with torch.no_grad():
                yield f"expect/norm/{step}/{name}", lengths([parameters[name]])[0]


class Network(nn.Module):
    """The last linear layer of relu(norm(linear)) layers is the head."""

    def __init__(self, linears: list[nn.Linear], norms: list[nn.Module]):
        super().__init__()
        self.linears, self.norms = nn.ModuleList(linears), nn.ModuleList(norms)
        self.linears[-1].role = "head"  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=False):
            x = nn.ReLU()(norm(linear(x)))
        return self.linears[-1](x)


def network(file: File) -> Network:
    *hidden, last = zip(file.hyperparameters["dims"], file.hyperparameters["dims"][1:], strict=False)
    linears = [nn.Linear(*sizes, bias=False) for sizes in hidden]
    return Network([*linears, nn.Linear(*last)], [norm(file, width) for _, width in hidden])


def norm(file: File, width: int) -> nn.Module:
    """Of the menu; RMSNorm has no offset, so a batch norm that only multiplies and adds follows one without a gain."""
    hyper = file.hyperparameters
    name = {"layernorm": "layer", "rmsnorm": "srms"}[hyper["norm"]]
    made = build("norm_layer", name, {"eps": hyper["norm_eps"]}, width)
    if hyper["affine"] == "none":
        return made.requires_grad_(False)
    gain_and_offset = nn.BatchNorm1d(width, eps=0.0)
    gain_and_offset.eval()
    return made if name == "layer" else nn.Sequential(made, gain_and_offset)


def parameters_of(modules: nn.ModuleList) -> list[tuple[int, str, nn.Parameter]]:
    """(number of the module, name in it, parameter)."""
    return [(i, name, p) for i, module in enumerate(modules) for name, p in module.named_parameters()]


def optimize(hyper: dict[str, Any]) -> Callable[[nn.Module], Optimizer]:
    if hyper["optimizer"] == "sgd":
        return optimizer("sgd", {"lr": hyper["lr"], "momentum": hyper["momentum"]})
    settings = {"lr": hyper["lr"], "betas": hyper["betas"], "eps": hyper["adam_eps"]}
    return optimizer("adamw", {**settings, "weight_decay": 0.0})
