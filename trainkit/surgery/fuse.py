"""Inference without the norms that are fixed then: each becomes part of the linear layers after it."""

from __future__ import annotations

from copy import deepcopy

from torch import nn

from trainkit.surgery.stream import readings, refuse_sharing


def fuse_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode without its batch-statistic norms, and with the same outputs.

    In eval such a norm (unified, rep_batch, prep_batch, batch) is y = a x + c per channel, which `scale_shift` tells.
    The linear layers after it take it over: W <- W diag(a), bias <- bias + W c, so layers without a bias get one. A
    head that shares the embedding's weights gets its own. Outputs agree to 1e-8 in float64 with those of model.eval().
    Norms of other kinds stay. Raises ValueError where there is nothing to fold, and for a norm that is not followed by
    linear layers alone: on a sublayer's output or on the stream, inside attention, or before a convolution.
    """
    refuse_sharing(model)
    model = deepcopy(model).eval()
    fixed = {name for name, module in model.named_modules() if hasattr(module, "scale_shift")}
    if not fixed:
        raise ValueError(
            "fusing folds norms that are a fixed scale and shift in eval; the model has none. "
            "Train with norm_layer=unified, rep_batch, prep_batch or batch"
        )
    names = {module: name for name, module in model.named_modules()}
    found = [(reading, reading.norm) for reading in readings(model) if names[reading.norm] in fixed]
    folded = [names[norm] for _, norm in found]
    for name in sorted(fixed):
        if not any(name == whole or name.startswith(f"{whole}.") for whole in folded):
            raise ValueError(
                f"a norm can be folded into linear layers that follow it directly; after {name} come others. "
                "Fuse a model that was trained with norm=pre"
            )
    for reading, norm in found:
        reading.fold(*norm.scale_shift())  # type: ignore[operator]
        reading.replace(nn.Identity())
    return model
