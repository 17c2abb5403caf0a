"""Optimizers that project matrices: onto singular directions, or onto columns of a cosine transform."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..registry import File, Steps, adapter, optimizer

ALL = {"decay": ["matrix", "vector"]}
ADAM = ("lr", "betas", "eps", "weight_decay")


def projected(name: str, file: File, options: str, **own: Any) -> Steps:
    """The matrices by `name`, with what the file says under `options`; the rest by HFAdamW."""
    given = dict(file.hyperparameters)
    subspace = given.pop(options)
    return Steps(optimizer(name, {**given, **subspace, **ALL, "rest": {**given}, **own}))


@adapter("GaLore-AdamW")
def galore(file: File) -> Steps:
    return projected("galore", file, "low_rank")


@adapter("Fira-AdamW")
def fira(file: File) -> Steps:
    return projected("fira", file, "low_rank")


@adapter("Conda")
def conda(file: File) -> Steps:
    return projected("conda", file, "conda")


@adapter("DCT-AdamW")
def dct_adamw(file: File) -> Steps:
    given = dict(file.hyperparameters)
    assert given.pop("proj") == "dct", "the released class has other matrices beside the cosine transform; we do not"
    given["transform"] = {"matmul": "dct3", "makhoul": "dct2"}[given.pop("sim_type")]

    def indices(model: nn.Module, made: Optimizer, step: int) -> Iterator[tuple[str, Tensor]]:
        for name in file.names(f"indices/{step}"):
            yield f"indices/{step}/{name}", torch.tensor(sorted(made.state[getattr(model, name)]["indices"].tolist()))

    return Steps(optimizer("dct_adamw", {**given, **ALL, "rest": chosen(given, ADAM)}), after=indices)


@adapter("Trion (Newton-Schulz in float64)")
def trion(file: File) -> Steps:
    given = dict(file.hyperparameters)
    names = {"kj": "spectral", "kimi": "match_rms_adamw", "dion": "ratio", "none": "none"}
    given["scale"] = names[given.pop("scaling")]
    given["steps"] = given.pop("ns_steps")
    aux = {"weight_decay": given["weight_decay"]}
    return Steps(optimizer("trion", {**given, **ALL, "dtype": "float64", "rest": aux}))


def chosen(settings: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names}
