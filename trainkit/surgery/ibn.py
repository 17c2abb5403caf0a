"""IBN-Net-a (Pan, Luo, Shi & Tang, ECCV 2018): instance norm for half of the channels where residual branches start."""

from __future__ import annotations

from re import fullmatch

import torch
from torch import nn

from trainkit.model.resnet import ResNet
from trainkit.norm_layer.batch import BatchNorm2d
from trainkit.norm_layer.ibn import IBN
from trainkit.surgery.swap import replace


def ibn_a(model: nn.Module, *, ratio: float = 0.5) -> nn.Module:
    """A ResNet with IBN for the first norm of every residual branch, in all stages but the last; in place.

    The shortcuts keep batch norm, and so does the last stage, whose content should not be normalized away: of the
    paper's four stages, the first three change. Weights, biases and, of the channels that stay with it, running
    statistics are those of the batch norms. Returns the model; raises ValueError for another kind of model, another
    norm layer, and a ResNet of one stage.
    """
    if not isinstance(model, ResNet):
        raise ValueError(f"IBN-Net-a is a ResNet; got {type(model).__name__}. Try model=resnet18 or model=resnet50")
    norms = {name: norm for name, norm in model.named_modules() if fullmatch(r"blocks\.\d+\.conv1\.norm", name)}
    chosen = {}
    for name, norm in norms.items():
        if type(norm) is not BatchNorm2d:
            raise ValueError(f"IBN-Net-a starts from batch norm; {name} is {type(norm).__name__}. Try norm_layer=batch")
        chosen[name] = norm
    widest = max(norm.num_features for norm in chosen.values())  # that of the last stage alone
    chosen = {name: norm for name, norm in chosen.items() if norm.num_features < widest}
    if not chosen:
        raise ValueError("IBN-Net-a leaves the last stage as it is; the model has no other. Try model.stages=[2,2,2,2]")
    for name, norm in chosen.items():
        replace(model, name, split(norm, ratio))
    return model


@torch.no_grad()
def split(norm: BatchNorm2d, ratio: float) -> IBN:
    """An IBN with the settings, parameters and running statistics of a batch norm."""
    width = norm.num_features
    made = IBN(width, axis=1, ratio=ratio, eps=norm.eps, momentum=norm.momentum, count=norm.count, sync=norm.sync).to(
        norm.weight
    )
    first, stored = made.widths[0], norm.state_dict()
    made.instance.load_state_dict({"gain": norm.weight[:first], "bias": norm.bias[:first]})
    made.batch.load_state_dict({name: value[first:] if value.dim() else value for name, value in stored.items()})
    return made.train(norm.training)
