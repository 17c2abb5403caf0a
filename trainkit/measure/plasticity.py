"""Whether a network can still learn: its units, the rank of its features, the size and the turning of its weights.

Units are channels, on `axis` of an activation h; everything else, samples, tokens or pixels, are its entries. Computed
in at least float32. Of features that are not finite every number here is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from trainkit.measure.representation import angle

LAYERS = (nn.Linear, _ConvNd)  # those with units to read; an embedding reads numbers of tokens
Statistics = dict[str, tuple[Tensor, Tensor]]


# --- units ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """What a layer's units did on a probe, additive over its batches.

    magnitude, positive: (units,), sum |h| and the number of entries h > 0; entries: how many there are of each unit.
    """

    magnitude: Tensor
    positive: Tensor
    entries: int

    @classmethod
    def of(cls, h: Tensor, axis: int = 1) -> Units:
        found = rows(h, axis)
        return cls(found.abs().sum(0), (found > 0).sum(0), len(found))

    def __add__(self, other: Units) -> Units:
        return Units(self.magnitude + other.magnitude, self.positive + other.positive, self.entries + other.entries)

    def scores(self) -> Tensor:
        """s_i = E|h_i| / mean_j E|h_j|: (units,); 0 for all where no unit does anything."""
        mean = self.magnitude.mean()
        return torch.where(mean == 0, 0.0, self.magnitude / mean)

    def dormant(self, tau: float = 0.025) -> Tensor:
        """The share of units with s_i <= tau."""
        return self._known((self.scores() <= tau).to(self.magnitude).mean())

    def dead(self) -> Tensor:
        """The share of units that were never positive."""
        return self._known((self.positive == 0).to(self.magnitude).mean())

    def active(self) -> Tensor:
        """The share of (entry, unit) pairs that were positive."""
        return self._known(self.positive.to(self.magnitude).mean() / self.entries)

    def _known(self, share: Tensor) -> Tensor:
        return torch.where(self.magnitude.isfinite().all(), share, torch.nan)


def dormant_fraction(h: Tensor, tau: float = 0.025, *, axis: int = 1) -> Tensor:
    """The share of units i with E|h_i| / mean_j E|h_j| <= tau, E over the entries.

    Dormant units (Sokar et al. 2023, arXiv:2302.12902). tau=0: units that are always 0; the paper's thresholds are
    0.025 and 0.1. For an image E is the mean over batch and space. Of a layer in which nothing happens all units are
    dormant.
    """
    return Units.of(h, axis).dormant(tau)


def dead_fraction(h: Tensor, *, axis: int = 1) -> Tensor:
    """The share of units that are positive on no entry: behind a ReLU they pass no gradient on."""
    return Units.of(h, axis).dead()


def active_fraction(h: Tensor, *, axis: int = 1) -> Tensor:
    """The share of all (entry, unit) pairs with h > 0."""
    return Units.of(h, axis).active()


def rows(h: Tensor, axis: int = 1, most: int | None = None) -> Tensor:
    """h with units on `axis` -> (entries, units); `most`: at most so many entries, at even distances."""
    found = h.to(torch.promote_types(h.dtype, torch.float32)).movedim(axis, -1).reshape(-1, h.shape[axis])
    if most is None or len(found) <= most:
        return found
    return found[torch.arange(most, device=h.device) * len(found) // most]


# --- ranks ----------------------------------------------------------------------------------------------------------


def singular_values(features: Tensor) -> Tensor:
    """Those of features (samples, units), the largest first, neither squared nor centred; NaN if one is not finite.

    There should be at least as many samples as units, or the samples bound the ranks below.
    """
    if features.dim() != 2:
        raise ValueError(
            f"features are a matrix (samples, units); got the shape {tuple(features.shape)}. "
            "trainkit.measure.plasticity.rows makes one of an activation"
        )
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    finite = features.isfinite().all()
    values = torch.linalg.svdvals(torch.where(finite, features, 0.0))  # which raises on what is not finite
    return torch.where(finite, values, torch.nan)


def srank(features: Tensor, delta: float = 0.01) -> Tensor:
    """The smallest k with sum_{i<=k} sigma_i >= (1 - delta) sum_i sigma_i (Kumar et al. 2021, arXiv:2010.14498).

    0 for zeros.
    """
    return srank_of(singular_values(features), delta)


def effective_rank(features: Tensor) -> Tensor:
    """exp(-sum_i p_i log p_i), p_i = sigma_i / sum sigma (Roy & Vetterli 2007): from 1 to the rank; 0 for zeros."""
    return effective_rank_of(singular_values(features))


def stable_rank(features: Tensor) -> Tensor:
    """sum_i sigma_i² / sigma_max² = ‖F‖_F² / ‖F‖_2²: at most the rank, hardly moved by small values; 0 for zeros."""
    return stable_rank_of(singular_values(features))


def nuclear_norm(features: Tensor) -> Tensor:
    """sum_i sigma_i / sqrt(samples) of features (samples, units): sum of the units' scales along the main directions.

    Divided so that it does not grow with the number of samples; between sqrt(E‖f‖²), where all rows point one way, and
    sqrt(rank · E‖f‖²), where no direction stands out.
    """
    return nuclear_norm_of(singular_values(features), len(features))


def nuclear_norm_of(values: Tensor, samples: int) -> Tensor:
    """nuclear_norm, of the singular values of so many samples."""
    return values.sum() / samples**0.5


def srank_of(values: Tensor, delta: float = 0.01) -> Tensor:
    """srank, of singular values (k,), the largest first."""
    total = values.sum()
    rank = ((values.cumsum(0) / total < 1 - delta).sum() + 1).clamp(max=len(values)).to(values)
    return torch.where(total.isnan(), torch.nan, torch.where(total > 0, rank, 0.0))


def effective_rank_of(values: Tensor) -> Tensor:
    """effective_rank, of singular values."""
    p = values / values.sum()
    return torch.where(values.sum() == 0, 0.0, torch.special.entr(p).sum().exp())


def stable_rank_of(values: Tensor) -> Tensor:
    """stable_rank, of singular values (k,), the largest first."""
    return torch.where(values.sum() == 0, 0.0, (values / values[0]).square().sum())


# --- weights --------------------------------------------------------------------------------------------------------


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name of a linear layer, convolution or embedding: its weight}, each trainable one once, in the model's order."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None) if isinstance(module, (*LAYERS, nn.Embedding)) else None
        if isinstance(weight, nn.Parameter) and weight.requires_grad and all(weight is not w for w in found.values()):
            found[name] = weight
    return found


def weight_norm(weight: Tensor) -> Tensor:
    """‖W‖, Frobenius, of a weight of any shape."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dtype=wide)


def effective_lr(lr: float, norm: Tensor, *, scale_free: bool) -> Tensor:
    """What lr amounts to for the direction of a scale-invariant weight of this norm: lr/‖W‖² or lr/‖W‖.

    f(c W) = f(W) gives grad f(c W) = grad f(W) / c; so a step on W turns it as a step of lr/‖W‖² on W/‖W‖ does for SGD,
    and one of lr/‖W‖ where the update's length does not follow the gradient's, as in Adam: `scale_free` (Lyle et al.
    2024, arXiv:2407.01800). It falls as ‖W‖ grows, whatever the schedule says. Infinite for a weight of zeros.
    """
    return lr / (norm if scale_free else norm.square())


def angular_update(before: Tensor, after: Tensor) -> Tensor:
    """arccos(<W, W'> / (‖W‖ ‖W'‖)), the angle in radians by which a step turned a weight; exact for small ones too."""
    return angle(before.detach().flatten(), after.detach().flatten())


# --- statistics of batch norms --------------------------------------------------------------------------------------


def statistics(model: nn.Module) -> Statistics:
    """{name of a layer with running statistics: copies of (running_mean, running_var)}."""
    found = {}
    for name, module in model.named_modules():
        mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(var, Tensor):
            found[name] = mean.detach().clone(), var.detach().clone()
    return found


def drift(before: Statistics, after: Statistics, eps: float = 1e-5) -> dict[str, tuple[Tensor, Tensor]]:
    """{layer in both: (sqrt(mean_c (m'_c - m_c)² / (v_c + eps)), mean_c |log((v'_c + eps) / (v_c + eps))|)}.

    How far the running statistics (m, v) moved from one snapshot to the next: the mean in standard deviations of the
    first, the variance as the logarithm of a factor, log 2 where it doubled or halved. Definitions of ours.
    """
    found = {}
    for name, (mean, var) in after.items():
        if name in before:
            old_mean, old_var = (old.to(mean) for old in before[name])
            moved = ((mean - old_mean).square() / (old_var + eps)).mean().sqrt()
            found[name] = moved, ((var + eps) / (old_var + eps)).log().abs().mean()
    return found
