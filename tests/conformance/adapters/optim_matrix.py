"""Optimizers that step matrices as matrices."""

from collections.abc import Mapping
from typing import Any

from ..registry import File, Steps, adapter, optimizer

ALL = {"decay": ["matrix", "vector"]}


def muon_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The file's words for Muon's settings -> ours."""
    names = {"ns_steps": "steps", "ns_coefficients": "coefficients", "ns_eps": "eps", "adjust_lr_fn": "scale"}
    settings = {names.get(name, name): value for name, value in given.items()}
    if "scale" in settings:
        settings["scale"] = {"match_rms_adamw": "match_rms_adamw"}.get(settings["scale"], "spectral")
    return settings


@adapter("Muon (Newton-Schulz in float64)")
def muon(file: File) -> Steps:
    h = file.hyperparameters
    return Steps(optimizer("muon", {**muon_settings(h["muon"]), "dtype": "float64", "rest": h["aux_adam"], **ALL}))


@adapter("Muon (bf16 Newton-Schulz, CPU)")
def muon_bf16(file: File) -> Steps:
    h = file.hyperparameters
    settings = {**muon_settings(h["muon"]), "dtype": "bfloat16", "rest": h["aux_adam"], **ALL}
    return Steps(optimizer("muon", settings), displacement=True)


@adapter("torch.optim.Muon (Newton-Schulz in float64)")
def muon_torch(file: File) -> Steps:
    settings = muon_settings(file.hyperparameters)
    return Steps(optimizer("muon", {**settings, "normalize": "clamp", "dtype": "float64", **ALL}))


@adapter("SinkGD")
def sinkgd(file: File) -> Steps:
    names = {"L": "iterations", "adam": "rest"}
    return Steps(optimizer("sinkgd", {names.get(k, k): v for k, v in file.hyperparameters.items()} | ALL))


@adapter("SWAN")
def swan(file: File) -> Steps:
    settings = {{"adam": "rest"}.get(k, k): v for k, v in file.hyperparameters.items()}
    return Steps(optimizer("swan", {**settings, "form": "swan", "whitening": "exact", **ALL}))


@adapter("SWAN (multi-norm form)")
def swan_multinorm(file: File) -> Steps:
    settings = {{"adam": "rest"}.get(k, k): v for k, v in file.hyperparameters.items()}
    return Steps(optimizer("swan", {**settings, "form": "multinorm", "whitening": "exact", **ALL}))


@adapter("AuON")
def auon(file: File) -> Steps:
    return Steps(optimizer("auon", {**file.hyperparameters, "takes": "all", **ALL}))


@adapter("AuON (paper v1 form)")
def auon_paper(file: File) -> Steps:
    settings = dict(file.hyperparameters)
    assert settings.pop("shape_scale") == "sqrt(max(1,rows/cols))"
    if settings.get("gamma") == "none (1)":
        settings["gamma"] = 1.0
    return Steps(optimizer("auon", {"weight_decay": 0.0, **settings, "form": "paper", "takes": "all", **ALL}))


@adapter("HybridAuON")
def hybrid_auon(file: File) -> Steps:
    settings = {{"ns_steps": "steps"}.get(k, k): v for k, v in file.hyperparameters.items()}
    return Steps(optimizer("hybrid_auon", {**settings, "takes": "all", **ALL}))
