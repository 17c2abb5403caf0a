"""Tune mode of convolution and batch norm (You et al., ICLR 2024, arXiv:2305.11624): eval's numbers, less memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from trainkit.norm_layer.batch import BatchNorm, BatchNorm2d
from trainkit.surgery.swap import recast, replace

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, BatchNorm, BatchNorm2d)


def tune_mode(model: nn.Module, pairs: Collection[Sequence[str]] | None = None) -> nn.Module:
    """Convolutions and the batch norms that follow them, fused on the fly, in place; returns the model.

    BN(conv(x; W, b)) by the running statistics m, v is conv(x; k W, bias + k (b - m)), k = weight/sqrt(v + eps) per
    output channel. Every forward computes that kernel from W, b, weight and bias, which stay the parameters, under
    their own names: values and all gradients are those of eval mode, while the activation between the two, which eval
    mode keeps for the backward, is never made. Once and for all fused weights would train otherwise (their gradient is
    k times this one's) and unstably.
    From then on these norms are frozen: model.train() leaves them by their running statistics, which never change.
    The state dict has the same keys and so goes back into a model with norms.

    pairs: [convolution, norm] by name, each norm reading its convolution alone, which nobody else reads. Left out, they
    are found by tracing the model (torch.fx). Raises ValueError where there is none, where a pair does not fit, and
    where the model's control flow cannot be traced.
    """
    found = [*(_pairs(model) if pairs is None else pairs)]
    if not found:
        raise ValueError(
            "tune mode needs a batch norm that alone follows a convolution; the model has none. Try norm_layer=batch"
        )
    for conv_name, norm_name in found:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        if type(conv) not in TUNED or not _is_batch_norm(norm) or _channels(conv) != norm.num_features:
            raise ValueError(
                f"tune mode joins a convolution and a batch norm of its output channels with running statistics; got "
                f"{conv_name}, {type(conv).__name__}, and {norm_name}, {type(norm).__name__}. Leave the pair out"
            )
        frozen = FrozenBatchNorm(norm)
        tuned = recast(conv, TUNED[type(conv)])
        tuned.norms = (frozen,)
        replace(model, conv_name, tuned)
        replace(model, norm_name, frozen)
    return model


class FrozenBatchNorm(nn.Module):
    """x -> x. The parameters and buffers of a batch norm whose work the convolution before it does."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.eps = float(norm.eps)  # type: ignore[arg-type]
        self.training = norm.training
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def scale_shift(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(k, c) of the norm's y = k x + c, each (C,)."""
        k = (self.running_var.to(dtype) + self.eps).rsqrt()
        if self.weight is not None:
            k = k * self.weight.to(dtype)
        c = -k * self.running_mean.to(dtype)
        return k, c if self.bias is None else c + self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Tuned(nn.Module):
    """What the fused convolutions share. `norms`: the frozen norm, in a tuple, since it is registered elsewhere."""

    norms: tuple[FrozenBatchNorm]
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    groups: int

    def fused(self) -> tuple[Tensor, Tensor]:
        """The kernel and the bias, in the dtype of the weight; computed in at least float32."""
        w = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        k, c = self.norms[0].scale_shift(w.dtype)
        if self.bias is not None:
            c = torch.addcmul(c, k, self.bias.to(w.dtype))
        if self.transposed:  # (C_in, C_out/groups, …): channel j of a group's inputs goes to channel j of its outputs
            grouped = w.unflatten(0, (self.groups, -1))
            w = (grouped * k.view(self.groups, 1, -1, *[1] * (w.dim() - 2))).view_as(w)
        else:
            w = w * k.view(-1, *[1] * (w.dim() - 1))
        return w.to(self.weight.dtype), c.to(self.weight.dtype)


class TunedConv1d(Tuned, nn.Conv1d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.fused())


class TunedConv2d(Tuned, nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.fused())


class TunedConv3d(Tuned, nn.Conv3d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self.fused())


TRANSPOSED = attrgetter("stride", "padding", "output_padding", "groups", "dilation")


class TunedConvTranspose1d(Tuned, nn.ConvTranspose1d):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose1d(input, *self.fused(), *TRANSPOSED(self))


class TunedConvTranspose2d(Tuned, nn.ConvTranspose2d):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose2d(input, *self.fused(), *TRANSPOSED(self))


class TunedConvTranspose3d(Tuned, nn.ConvTranspose3d):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return F.conv_transpose3d(input, *self.fused(), *TRANSPOSED(self))


TUNED: dict[type[nn.Module], type[Tuned]] = {
    nn.Conv1d: TunedConv1d,
    nn.Conv2d: TunedConv2d,
    nn.Conv3d: TunedConv3d,
    nn.ConvTranspose1d: TunedConvTranspose1d,
    nn.ConvTranspose2d: TunedConvTranspose2d,
    nn.ConvTranspose3d: TunedConvTranspose3d,
}


def _is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm of channels on axis 1 with a fixed eval."""
    return type(module) in BATCH_NORMS and module.running_mean is not None and getattr(module, "axis", 1) == 1


def _channels(conv: nn.Module) -> int:
    return conv.out_channels  # type: ignore[return-value]


class _Tracer(fx.Tracer):
    """Looks only into modules that hold a convolution or a batch norm; what else they do inside is none of ours."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        parts = [part for part in m.modules() if part is not m]
        return type(m).__module__.startswith("trainkit.norm_layer") or not any(
            type(part) in TUNED or type(part) in BATCH_NORMS for part in parts
        )


def _pairs(model: nn.Module) -> Iterable[tuple[str, str]]:
    """(convolution, norm) by name wherever the norm reads the convolution alone, each is called once, in that order."""
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever the model's own code raises when it meets a symbol for a tensor
        raise ValueError(
            f"tune mode finds convolutions and their norms by tracing, which {type(model).__name__} does not allow "
            f"({type(error).__name__}: {error}). Name them: pairs=[['conv1', 'bn1'], …]"
        ) from error
    calls = [node for node in graph.nodes if node.op == "call_module"]
    modules = dict(model.named_modules())
    used = [id(modules[str(node.target)]) for node in calls]
    for node in calls:
        norm = modules[str(node.target)]
        if not _is_batch_norm(norm) or len(node.args) != 1 or node.kwargs or used.count(id(norm)) > 1:
            continue
        (before,) = node.args
        if not isinstance(before, fx.Node) or before.op != "call_module" or set(before.users) != {node}:
            continue
        conv = modules[str(before.target)]
        if type(conv) in TUNED and used.count(id(conv)) == 1 and _channels(conv) == norm.num_features:
            yield str(before.target), str(node.target)
