"""Weight standardization (Qiao et al. 2019, arXiv:1903.10520) for the convolutions of a built model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from trainkit.model.parts.standardized_conv import DENOMINATORS, ScaledStandardizedConv2d, StandardizedConv2d
from trainkit.surgery.swap import recast, replace


def standardize_weights(
    model: nn.Module, *, form: str = "bcn", eps: float | None = None, keep: Collection[str] = ()
) -> nn.Module:
    """Every Conv2d of `model` (exactly, no subclasses) as a StandardizedConv2d, in place; returns the model.

    Parameters stay the same objects under the same names, so optimizers and checkpoints keep fitting. `form`: the
    denominator, bcn, readme or bit; eps: null for that form's own. `keep`: names of convolutions to leave alone, such
    as those that no norm follows. Raises ValueError where there is none to convert, a name in `keep` is unknown, or a
    filter has a single weight.
    """
    if form not in DENOMINATORS:
        raise ValueError(f"form is one of {', '.join(DENOMINATORS)}; got {form!r}")
    default = 1e-6 if form == "bit" else 1e-5

    def make(conv: nn.Conv2d) -> nn.Module:
        standardized = recast(conv, StandardizedConv2d)
        standardized.form, standardized.eps = form, default if eps is None else eps
        return standardized

    return _convert(model, make, keep)


def scaled_standardize_weights(
    model: nn.Module, *, gamma: float = 1.7139588594436646, eps: float = 1e-6, keep: Collection[str] = ()
) -> nn.Module:
    """The same as ScaledStandardizedConv2d, which adds a parameter `gain` per filter; gamma: 1.71 follows a ReLU.

    For networks without norm layers (NF-Nets); convert before the optimizer is built. `keep` may hold the first
    convolution, whose input no activation has halved, to convert it with gamma=1 by itself.
    """

    def make(conv: nn.Conv2d) -> nn.Module:
        scaled = recast(conv, ScaledStandardizedConv2d)
        scaled.form, scaled.eps, scaled.gamma = "bit", eps, gamma
        weight = conv.weight
        scaled.gain = nn.Parameter(torch.ones(len(weight), 1, 1, 1, dtype=weight.dtype, device=weight.device))
        return scaled

    return _convert(model, make, keep)


def _convert(model: nn.Module, make, keep: Collection[str]) -> nn.Module:
    convs = {name: module for name, module in model.named_modules() if type(module) is nn.Conv2d}
    unknown = sorted(set(keep) - set(convs))
    if unknown:
        raise ValueError(f"keep names a Conv2d that the model lacks: {unknown[0]}; it has {', '.join(convs) or 'none'}")
    chosen = {name: conv for name, conv in convs.items() if name not in keep}
    if not chosen:
        raise ValueError("weight standardization needs a Conv2d to convert; the model has none")
    for name, conv in chosen.items():
        if conv.weight[0].numel() < 2:
            raise ValueError(
                f"weight standardization needs two weights per filter; {name or 'the convolution'} has 1, which is its "
                f"own mean. Leave it as it is: keep=[{name!r}]"
            )
    for name, conv in chosen.items():
        model = replace(model, name, make(conv))
    return model
