"""First layers with a gradient of their own, and how large a batch a gradient needs."""

from collections.abc import Mapping
from itertools import count, takewhile

import torch

from trainkit.measure.gradient_variance import (
    augmented_test,
    grown,
    inner_product_test,
    norm_test,
    of_samples,
)
from trainkit.model.parts.tract import TrActConv2d, TrActLinear

from ..registry import File, Pairs, adapter


@adapter("TrAct linear")
def tract_linear(file: File) -> Pairs:
    rows, columns = file["input/weight"].shape
    return backward(TrActLinear(columns, rows, bias="input/bias" in file, lam=file.hyperparameters["lam"]), file)


@adapter("TrAct conv2d")
def tract_conv(file: File) -> Pairs:
    hyper = file.hyperparameters
    settings = {name: hyper[name] for name in ("stride", "padding", "dilation", "groups") if name in hyper}
    out = len(file["input/weight"])
    layer = TrActConv2d(
        file["input/x"].shape[1],
        out,
        tuple(file["input/weight"].shape[2:]),
        bias="input/bias" in file,
        lam=hyper["lam"],
        **settings,
    )
    return backward(layer, file)


def backward(layer: torch.nn.Module, file: File) -> Pairs:
    names = [name for name in ("weight", "bias") if f"input/{name}" in file]
    layer.load_state_dict({name: file[f"input/{name}"] for name in names})
    x = file["input/x"].requires_grad_()
    z = layer(x)
    z.backward(file["input/grad_output"])
    found = {"output": z, "grad_x": x.grad}
    found |= {f"grad_{name}": getattr(layer, name).grad for name in names}
    for name in file.names("expect"):
        yield f"expect/{name}", found[name]


@adapter("AdAdaGrad batch-size tests")
def adadagrad(file: File) -> Pairs:
    """Rows: the new batch, the variances that the test reads, and the squared norm of the mean gradient."""
    for case in takewhile(file.names, map("case{}".format, count())):
        stacks = [file[f"{case}/per_sample_grad/{name}"] for name in file.names(f"{case}/per_sample_grad")]
        batch, found = len(stacks[0]), of_samples(stacks)
        for setting in file.names(f"{case}/norm_test"):
            eta = float(setting)
            # The file writes nu as a formula in theta, "2*theta for the augmented test".
            nu = eval(file.hyperparameters["nu"].split(" ")[0], {}, {"theta": eta})
            rows: Mapping[str, tuple[float, ...]] = {
                "norm_test": (grown(batch, norm_test(found, eta=eta)), found.total),
                "inner_product_test": (grown(batch, inner_product_test(found, theta=eta)), found.along),
                "augmented_ip_test": (
                    grown(batch, augmented_test(found, theta=eta, nu=nu)),
                    found.along,
                    found.across,
                ),
            }
            for test, row in rows.items():
                yield f"{case}/{test}/{setting}", torch.tensor((*row, found.square), dtype=torch.float64)
