"""The residual stream of a built model: what reads it and what writes to it, found by structure.

A sublayer is the `f` of a wrapper. Of its linear layers those marked `writes_stream` write to the stream; the others
read what the norm before the sublayer makes of it. `after` is the norm before `head`. Whatever stands outside of
sublayers, final norm and head makes the features that the stream starts with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainkit.norm.lns import Scaled
from trainkit.norm.placement import Residual


@dataclass(frozen=True)
class Reading:
    """A norm on the stream, owner.<slot>, and the linear layers that read factor · norm(stream)."""

    name: str
    owner: nn.Module
    slot: str
    linears: list[nn.Linear]

    @property
    def norm(self) -> nn.Module:
        found = getattr(self.owner, self.slot)
        return found.norm if isinstance(found, Scaled) else found

    @property
    def factor(self) -> float:
        found = getattr(self.owner, self.slot)
        return found.factor if isinstance(found, Scaled) else 1.0

    def fold(self, scale: Tensor, shift: Tensor | None) -> None:
        """Makes the linear layers read x where they read factor · (scale · x + shift): W diag(scale), bias + W shift.

        Computed in float64; a layer without a bias gets one if there is a shift. Raises ValueError for a layer that
        reads another number of channels.
        """
        for linear in self.linears:
            if linear.in_features != len(scale):
                raise ValueError(
                    f"{self.name} normalizes {len(scale)} channels, but a linear layer after it reads "
                    f"{linear.in_features}, so it cannot take the norm's weights: this model cannot be converted"
                )
            weight = linear.weight.double() * self.factor
            if shift is not None:
                bias = weight @ shift.double()
                assign(linear, "bias", bias if linear.bias is None else bias + linear.bias)
            assign(linear, "weight", weight * scale.double())

    def replace(self, norm: nn.Module) -> None:
        """Puts `norm` in the place of the norm and its factor."""
        setattr(self.owner, self.slot, norm.train(self.owner.training))


def readings(model: nn.Module) -> Iterator[Reading]:
    """The norms on the inputs of sublayers, and the one before the head.

    Raises ValueError for a sublayer without a linear layer marked writes_stream, or with none beside it.
    """
    for name, module in model.named_modules():
        if isinstance(module, Residual) and module.pre is not None:
            linears = [m for m in module.f.modules() if isinstance(m, nn.Linear)]
            inner = [m for m in linears if not writes_stream(m)]
            if not 0 < len(inner) < len(linears):
                raise ValueError(
                    f"a sublayer must have a linear layer that reads the stream and another one, marked writes_stream, "
                    f"that writes to it; {name}.f has {len(inner)} and {len(linears) - len(inner)}: this model cannot "
                    "be converted"
                )
            yield Reading(f"{name}.pre", module, "pre", inner)
    head = getattr(model, "head", None)
    if isinstance(head, nn.Linear) and isinstance(getattr(model, "after", None), nn.Module):
        yield Reading("after", model, "after", [head])


@dataclass(frozen=True)
class Writing:
    """A parameter, owner.<name>, whose entries along `axis` are channels of the stream."""

    owner: nn.Module
    name: str
    axis: int

    @property
    def value(self) -> Tensor:
        return getattr(self.owner, self.name)

    def centre(self) -> None:
        """Subtracts the mean over the channels."""
        value = self.value.double()
        assign(self.owner, self.name, value - value.mean(self.axis, keepdim=True))

    def drop_last_channel(self) -> None:
        left = self.value.shape[self.axis] - 1
        assign(self.owner, self.name, self.value.narrow(self.axis, 0, left))
        for size in ("out_features", "embedding_dim"):
            if hasattr(self.owner, size):
                setattr(self.owner, size, left)


def writings(model: nn.Module, width: int) -> Iterator[Writing]:
    """Every parameter that writes to a stream of `width` channels. Raises ValueError for one that it cannot judge."""
    apart = [m for name, m in model.named_modules() if isinstance(m, Residual) or name in ("after", "head")]
    reading = {m for part in apart for m in part.modules()}
    for name, module in model.named_modules():
        if module in reading and not writes_stream(module):
            continue
        axis = 0 if isinstance(module, nn.Linear) else -1
        known = isinstance(module, (nn.Linear, nn.Embedding)) or module is model
        for own, parameter in module.named_parameters(recurse=False):
            if not known or parameter.shape[axis] != width:
                raise ValueError(
                    f"what makes the features must be linear layers, embeddings and the model's own parameters, of the "
                    f"stream's {width} channels; {f'{name}.{own}'.lstrip('.')} of {type(module).__name__} is something "
                    "else: this model cannot be converted"
                )
            yield Writing(module, own, axis)


def writes_stream(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and getattr(module, "writes_stream", False) is True


def refuse_sharing(model: nn.Module) -> None:
    """Raises ValueError where modules share a parameter, unless it is the head that shares the embedding's weights."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(parameter, name)
        if other != name and name != "head.weight":
            raise ValueError(
                f"each norm is folded into the linear layers after it, so these need weights of their own; {name} and "
                f"{other} are one parameter: this model cannot be converted"
            )


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter in the place of an old one, of its dtype; what shared the old one keeps that."""
    like: nn.Parameter = getattr(module, name)
    if like is None:
        like = module.weight  # type: ignore[assignment]
    new = value.detach().to(like.dtype, copy=True, memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(new, requires_grad=like.requires_grad))
