"""Drives a layer through the calls of a golden file, and compares."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .registry import File, Layer, Pairs, Steps, find

ROUNDING = 1e-14  # absolute; what exact zeros may come out as


def check(file: File) -> int:
    """Compares everything the file expects; the number of arrays compared. LookupError if no adapter knows the file."""
    entry = find(file.algorithm)
    if entry is None:
        raise LookupError(
            f"no adapter for algorithm {file.algorithm!r}: write one in tests/conformance/adapters, "
            "or list the algorithm in not_yet.txt"
        )
    compared: set[str] = set()
    compare = equal
    with default_dtype(file.dtype):
        made = entry.function(file)
        if isinstance(made, Layer):
            made = run_layer(made, file)
        elif isinstance(made, Steps):
            compare = Displacements(file).equal if made.displacement else equal
            made = run_steps(made, file)
        for name, actual in made:
            compare(name, actual, file.expected(name), entry.rtol.get(name, file.rtol))
            compared.add(name)
    unused = file.unused(compared)
    assert compared, "nothing was compared"
    assert not unused, f"{len(unused)} arrays were never compared: {unused[:8]}"
    return len(compared)


def run_layer(layer: Layer, file: File) -> Pairs:
    """Load; for each training call forward, backward, and what it left behind; then eval mode.

    Parameters are not updated between calls. Buffers of a call start from those that the one before it left.
    """
    module = layer.module.to(file.dtype).train()
    load(layer, file)
    for step in range(1, file.steps + 1):
        x, gy = arrange(file.call("x", step), layer), arrange(file.call("gy", step), layer)
        x.requires_grad_()
        module.zero_grad(set_to_none=True)
        y = module(x, **extra_inputs(layer, file, f"/{step}"))
        y.backward(gy)
        if layer.after_call:
            layer.after_call(module, step)
        expects = set(file.names("expect"))
        if f"y/{step}" in expects:
            yield f"expect/y/{step}", restore(y, layer)
        if f"gx/{step}" in expects:
            yield f"expect/gx/{step}", restore(x.grad, layer)
        for name in file.names(f"expect/gparam/{step}"):
            parameter, transposed = named(module, layer.params.get(name, name))
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            yield f"expect/gparam/{step}/{name}", gradient.T if transposed else gradient
        yield from buffers(layer, file, str(step))

    module.eval()
    if "x_eval" in file:
        with torch.no_grad():
            y = module(arrange(file["x_eval"], layer), **extra_inputs(layer, file, "_eval"))
        yield "expect/y_eval", restore(y, layer)
        yield from buffers(layer, file, "eval")
    if layer.extra:
        with torch.no_grad():
            yield from layer.extra(module)


def run_steps(steps: Steps, file: File) -> Pairs:
    """Every parameter after every step. Gradients are copies, which a method may overwrite."""
    model = nn.Module()
    for name in file.names("init"):
        model.register_parameter(name, nn.Parameter(file[f"init/{name}"]))
    optimizer = steps.make(model)
    for step in range(1, file.steps + 1):
        for name, parameter in model.named_parameters():
            parameter.grad = file[f"grad/{step}/{name}"]
        if steps.before:
            steps.before(model, optimizer, step)
        optimizer.step()
        for name, parameter in model.named_parameters():
            yield f"expect/{step}/{name}", parameter
        if steps.after:
            yield from steps.after(model, optimizer, step)


def load(layer: Layer, file: File) -> None:
    """The file's initial state into the module, which must have no parameter besides."""
    module, given = layer.module, set()
    with torch.no_grad():
        for kind, names in (("param", layer.params), ("buffer", layer.buffers)):
            for name in file.names(kind):
                target, transposed = named(module, names.get(name, name))
                value = file[f"{kind}/{name}"]
                target.copy_(like(value.T if transposed else value, target, f"{kind}/{name}"))
                given.add(id(target))
    missing = [name for name, parameter in module.named_parameters() if id(parameter) not in given]
    assert not missing, f"the file gives no value for the parameters {missing}"


def buffers(layer: Layer, file: File, when: str) -> Pairs:
    for name in file.names(f"expect/buffer/{when}"):
        value, transposed = named(layer.module, layer.buffers.get(name, name))
        yield f"expect/buffer/{when}/{name}", value.T if transposed else value


def extra_inputs(layer: Layer, file: File, suffix: str) -> dict[str, Tensor]:
    return {keyword: file[name + suffix] for name, keyword in layer.inputs.items() if name + suffix in file}


def named(module: nn.Module, name: str) -> tuple[Tensor, bool]:
    """The parameter or buffer called so, and whether its transpose is meant."""
    transposed = name.endswith(".T")
    path, _, attribute = name.removesuffix(".T").rpartition(".")
    return getattr(module.get_submodule(path), attribute), transposed


def arrange(value: Tensor | None, layer: Layer) -> Tensor:
    assert value is not None, "the file lacks x or gy of a call"
    return value if layer.permute is None else value.permute(layer.permute).contiguous()


def restore(value: Tensor | None, layer: Layer) -> Tensor:
    assert value is not None, "the input has no gradient"
    if layer.permute is None:
        return value
    return value.permute([layer.permute.index(axis) for axis in range(value.dim())])


def like(value: Tensor, target: Tensor, name: str) -> Tensor:
    """`value` in the shape of `target`, which may differ by axes of size one only."""
    long = [[n for n in t.shape if n != 1] for t in (value, target)]
    assert long[0] == long[1], f"{name}: shape {tuple(value.shape)} against {tuple(target.shape)}"
    return value.reshape(target.shape)


def equal(name: str, actual: object, expected: Tensor, rtol: float) -> None:
    """max|actual - expected| <= rtol · max|expected|; integers and NaN positions exactly."""
    value = torch.as_tensor(actual).detach()
    value = like(value, expected, name)
    if not expected.is_floating_point():
        assert torch.equal(value.to(expected.dtype), expected), f"{name}: {value} is not {expected}"
        return
    value = value.to(expected.dtype)
    nan = expected.isnan()
    assert torch.equal(value.isnan(), nan), f"{name}: NaN in other places than expected"
    error = (value - expected)[~nan].abs()
    scale = expected[~nan].abs()
    if error.numel():
        worst, limit = error.max().item(), rtol * scale.max().item() + ROUNDING
        assert worst <= limit, f"{name}: largest error {worst:.3g} exceeds {limit:.3g} (rtol {rtol:g})"


class Displacements:
    """‖d - d_expected‖ <= rtol · ‖d_expected‖ for what each step moved a parameter, d, by Frobenius norm."""

    def __init__(self, file: File):
        self.file = file
        self.last: dict[str, tuple[Tensor, Tensor]] = {}  # by parameter: actual and expected before the step

    def equal(self, name: str, actual: Tensor, expected: Tensor, rtol: float) -> None:
        parameter = name.rpartition("/")[2]
        now = actual.detach().clone(), expected.to(actual.dtype)
        start = self.file[f"init/{parameter}"]
        moved, wanted = (a - b for a, b in zip(now, self.last.get(parameter, (start, start)), strict=True))
        error, limit = (moved - wanted).norm().item(), rtol * wanted.norm().item()
        assert error <= limit, f"{name}: the displacement is off by {error:.3g}, more than {limit:.3g} (rtol {rtol:g})"
        self.last[parameter] = now


@contextmanager
def default_dtype(dtype: torch.dtype):
    """Modules built inside start in this dtype, and so do the scalars they compute."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
