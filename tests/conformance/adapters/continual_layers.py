"""Layers of continual learning."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainkit.continual.adab2n import AdaB2NStrategy
from trainkit.norm_layer.task_ids import announce

from ..registry import File, Layer, Pairs, adapter, build
from ..runner import load


@adapter("AdaB2N*")
def adab2n(file: File) -> Pairs:
    """The strategy, on a network that is one BatchNorm."""
    hyper = file.hyperparameters
    words = {"eps": hyper["eps"], "momentum": hyper["momentum"], "count": "call"}
    norm = build("norm_layer", "batch", words, width(file), axis=1)
    strategy: AdaB2NStrategy = build(
        "continual",
        "adab2n",
        {"tasks": hyper["num_tasks"], "kappa": hyper["kappa"], "lambda_reg": hyper["lambda_reg"], "from_task": 0},
    )
    layer: Any = strategy.convert(norm).to(file.dtype).train()
    layer.regularize = True  # the file has R where its weight is 0, too
    load(Layer(layer), file)
    for step, (_, counted) in enumerate(hyper["plan"], 1):
        layer.cur_tasks.copy_(file[f"cur_tasks/{step}"])
        if counted is None:
            announce(layer, None)
        else:
            strategy.begin_batch(layer, file[f"task_id/{step}"])
        x = file[f"x/{step}"].requires_grad_()
        layer.zero_grad()
        y = layer(x)
        regularizer = layer._noted[0]
        torch.autograd.backward([y, torch.as_tensor(strategy.penalty(layer))], [file[f"gy/{step}"], None])
        yield f"expect/y/{step}", y
        yield f"expect/gx/{step}", x.grad
        yield f"expect/reg_loss/{step}", regularizer
        yield f"expect/eta/{step}", layer.eta
        yield from state(layer, file, step)
    layer.eval()
    yield "expect/y_eval", layer(file["x_eval"])


def state(layer: nn.Module, file: File, step: int) -> Iterable[tuple[str, Any]]:
    for name in file.names(f"expect/gparam/{step}"):
        parameter = getattr(layer, name)
        yield f"expect/gparam/{step}/{name}", torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    for name in file.names(f"expect/buffer/{step}"):
        yield f"expect/buffer/{step}/{name}", getattr(layer, name)


def batch(file: File, *more: str) -> dict[str, Any]:
    """The settings of every batch norm, and those among `more` that the file has."""
    names = ("eps", "momentum", *more)
    return {name: file.hyperparameters[name] for name in names if name in file.hyperparameters} | {"count": "call"}


def width(file: File) -> int:
    return file["param/weight"].numel()


@adapter("Continual Normalization*")
def continual(file: File) -> Layer:
    return Layer(build("norm_layer", "continual_norm", batch(file, "groups"), width(file), axis=1))


@adapter("Ghost Batch Norm*")
def ghost(file: File) -> Layer:
    words = {"num_chunks": "chunks", "ghost_batch": "ghost"}
    sizes = {ours: file.hyperparameters[theirs] for theirs, ours in words.items() if theirs in file.hyperparameters}
    return Layer(build("norm_layer", "ghost_batch", {**batch(file), **sizes}, width(file), axis=1))


@adapter("Batch Renormalization*")
def renorm(file: File) -> Layer:
    """Its bounds are given for every call, or once."""
    bounds = {name: file.hyperparameters[name] for name in ("r_max", "d_max")}
    always = {"r_ramp": [0, 0], "d_ramp": [0, 0]}

    def at(step: int) -> dict[str, float]:
        return {name: given[step] if isinstance(given, list) else given for name, given in bounds.items()}

    def next_bounds(module: nn.Module, step: int) -> None:
        if step < file.steps:
            for name, bound in at(step).items():
                setattr(module, name, bound)

    layer = build("norm_layer", "batch_renorm", {**batch(file), **always, **at(0)}, width(file), axis=1)
    return Layer(layer, after_call=next_bounds)
