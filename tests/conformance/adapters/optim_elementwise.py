"""Optimizers that work entry by entry, or on norms of rows and layers."""

from ..registry import File, Steps, adapter, optimizer

EVERYTHING = {"decay": ["matrix", "vector"]}  # one group: the authors' examples decay vectors too


@adapter("Lion")
def lion(file: File) -> Steps:
    return Steps(optimizer("lion", {**file.hyperparameters, **EVERYTHING}))


@adapter("AdamP")
def adamp(file: File) -> Steps:
    return Steps(optimizer("adamp", {**file.hyperparameters, **EVERYTHING}))


@adapter("SGDP")
def sgdp(file: File) -> Steps:
    return Steps(optimizer("sgdp", {**file.hyperparameters, **EVERYTHING}))


@adapter("diffGrad (v2, bug fixed)")
def diffgrad(file: File) -> Steps:
    return Steps(optimizer("diffgrad", {**file.hyperparameters, **EVERYTHING}))


@adapter("LAMB")
def lamb(file: File) -> Steps:
    return Steps(optimizer("lamb", file.hyperparameters))


@adapter("LARS (SGD) / LARC")
def lars(file: File) -> Steps:
    return Steps(optimizer("lars", file.hyperparameters))


@adapter("AdaGradNorm (single scalar accumulator over all params)")
def adagrad_norm(file: File) -> Steps:
    names = {"b0_squared": "initial_accumulator_value"}
    settings = {names.get(key, key): value for key, value in file.hyperparameters.items()}
    return Steps(optimizer("adagrad_norm", {**settings, "form": "scalar"}))


@adapter("AdaGradNorm, per-output-row variant of the official code")
def adagrad_norm_by_row(file: File) -> Steps:
    return Steps(optimizer("adagrad_norm", {**file.hyperparameters, "form": "row"}))
