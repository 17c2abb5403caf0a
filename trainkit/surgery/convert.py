"""A trained Pre-LN model as its exact Pre-RMSNorm and Pre-CRMSNorm twin (Jiang et al. 2023, arXiv:2305.14858)."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from trainkit.norm.placement import Residual
from trainkit.norm_layer.crms import CRMSNorm
from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.rms import RMSNorm
from trainkit.surgery.stream import Reading, Writing, assign, readings, refuse_sharing, writings


def to_pre_rms(model: nn.Module) -> nn.Module:
    """A copy of a Pre-LN model with RMSNorm in the place of LayerNorm and the same outputs.

    1. Each LayerNorm's gain g and bias b go into the linear layers after it: W <- W diag(g), bias <- bias + W b, so
       layers without a bias get one.
    2. What writes to the stream (embeddings, class token, output projections and their biases) loses its mean over
       channels. The stream then has mean zero, to which LayerNorm is blind.
    3. Of a row with mean zero the variance is the mean square, so RMSNorm with the same eps and gains of 1 takes over.
    A head that shares the embedding's weights gets its own, since the two change differently. Outputs agree to 1e-8 in
    float64. Trained further, the twin is a model of its own: nothing keeps its stream's mean at zero.
    Raises ValueError where the placement is not Pre-LN (norm=pre; lns and skipinit are as well), the norm layer is not
    LayerNorm, the stream has dropout, which would break the zero mean, or a part of the model cannot be judged.
    """
    model, norms, _ = _centred(model)
    for reading, old in norms:
        reading.replace(RMSNorm(old.width, axis=old.axis, eps=old.eps).to(old.gain))
    return model


def to_pre_crms(model: nn.Module) -> nn.Module:
    """A copy of a Pre-LN model with CRMSNorm, the same outputs and one channel less in the stream.

    After steps 1 and 2 of to_pre_rms the last of the d channels is minus the sum of the others and need not be stored:
    what writes to the stream loses its last output, what reads a normalized row has W[:, :-1] - W[:, -1:] for W, and
    CRMSNorm finds the mean square of d channels from d - 1. Raises ValueError as to_pre_rms does.
    """
    model, norms, written = _centred(model)
    for part in written:
        part.drop_last_channel()
    for reading, old in norms:
        for linear in reading.linears:
            weight = linear.weight.double()
            assign(linear, "weight", weight[:, :-1] - weight[:, -1:])
            linear.in_features -= 1
        reading.replace(CRMSNorm(old.width - 1, axis=old.axis, eps=old.eps))
    return model


def _centred(model: nn.Module) -> tuple[nn.Module, list[tuple[Reading, LayerNorm]], list[Writing]]:
    """A copy after steps 1 and 2: its norms, all of them folded, and what writes to its stream."""
    refuse_sharing(model)
    _refuse_other_placements(model)
    _refuse_dropout(model)
    model = deepcopy(model)
    norms = [(reading, _layer_norm(reading)) for reading in readings(model)]
    for reading, norm in norms:
        reading.fold(norm.gain, norm.bias)
    written = list(writings(model, norms[0][1].width))
    for part in written:
        part.centre()
    return model, norms, written


def _layer_norm(reading: Reading) -> LayerNorm:
    if type(reading.norm) is not LayerNorm:
        raise ValueError(
            f"the conversion starts from LayerNorm; {reading.name} is {type(reading.norm).__name__}. "
            "Convert a model that was trained with norm_layer=layer"
        )
    return reading.norm


def _refuse_other_placements(model: nn.Module) -> None:
    """Raises ValueError unless every sublayer is h + a · f(norm(h)), a scalar, with nothing else on the stream."""
    missing = [part for part in ("before", "after", "head") if not isinstance(getattr(model, part, None), nn.Module)]
    wrappers = [(name, module) for name, module in model.named_modules() if "f" in module._modules]
    if missing or not wrappers:
        lacks = missing[0] if missing else "residual sublayer"
        raise ValueError(
            f"the conversion needs a residual model with the parts before, after and head, such as those of "
            f"trainkit.model; {type(model).__name__} has no {lacks}"
        )
    why = {}
    if not isinstance(model.before, nn.Identity):
        why["before"] = f"{type(model.before).__name__} stands between the embedding and the stream"
    for name, module in wrappers:
        if type(module) is not Residual:
            why[name] = f"{name} is {type(module).__name__}"
        elif module.out is not None or module.post is not None:
            why[name] = f"{name} normalizes its {'output' if module.out is not None else 'sum'}"
        elif module.pre is None:
            why[name] = f"{name} has no norm on its input"
        elif any(isinstance(factor, Tensor) and factor.numel() > 1 for factor in (module.skip, module.scale)):
            why[name] = f"{name} scales channels one by one"
    if why:
        raise ValueError(
            "the conversion needs Pre-LN, where the stream is a sum that no norm touches: h + f(norm(h)); "
            f"{next(iter(why.values()))}. Convert a model that was trained with norm=pre"
        )


def _refuse_dropout(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "dropout", 0.0)
        if isinstance(rate, (int, float)) and rate > 0:
            raise ValueError(
                f"the conversion needs a stream whose mean stays zero, which dropout breaks in training; "
                f"{name or type(model).__name__} has dropout {rate:g}. Convert with model.dropout=0"
            )
