"""What an optimizer's step does to each part of a network: how far it goes, and what the optimizer remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.measure.lengths import lengths, rms

Groups = Mapping[str, Sequence[Tensor]]  # as measure.sites gives them


def copies(groups: Groups) -> dict[str, list[Tensor]]:
    """The parameters as they are now; as much memory as they take."""
    return {label: [p.detach().clone() for p in parameters] for label, parameters in groups.items()}


@torch.no_grad()
def parameter_norm(groups: Groups) -> dict[str, Tensor]:
    """‖θ‖ of each group and of the totals (measure/lengths.py), 0-d."""
    return lengths({label: [p.detach() for p in parameters] for label, parameters in groups.items()})


@torch.no_grad()
def update_ratio(before: Groups, groups: Groups) -> dict[str, Tensor]:
    """‖θ' - θ‖ / ‖θ‖ of each group and of the totals, 0-d: θ is `before`, θ' what `groups` are now.

    About 1e-3 is what people aim at. Of a group that was all zeros, as biases are at first: infinite, or 0 where it has
    not moved. `before` is used up: it holds θ' - θ afterwards.
    """
    old = lengths(before)
    moved = [tensor for tensors in before.values() for tensor in tensors]
    if moved:
        torch._foreach_sub_(moved, [p.detach() for parameters in groups.values() for p in parameters])
    new = lengths(before)
    return {name: torch.where(new[name] == 0, 0.0, new[name] / old[name]) for name in old}


@torch.no_grad()
def moments(groups: Groups, state: Mapping[Any, Mapping[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """{name of a state: sqrt(mean s²) of each group and of the totals}, for an optimizer's state per parameter.

    Every state that is as large as its parameter counts, by the name that the optimizer gives it: exp_avg and
    exp_avg_sq of Adam, momentum_buffer of SGD, … Groups without it are left out.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    for label, parameters in groups.items():
        for p in parameters:
            for name, value in state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape and value.is_floating_point() and p.dim():
                    found.setdefault(name, {}).setdefault(label, []).append(value)
    return {name: rms(members) for name, members in found.items()}
