"""Soft cap on singular values, coupled to the step (Newhouse et al. 2025, arXiv:2507.13338): a bound at little cost."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.projection.constraint import SpectralConstraint, scale
from trainkit.projection.spectral import coupling, released_coupling, soft_cap


class SoftCap(SpectralConstraint):
    """s <- s - alpha s³, then s <- s + alpha s³, for the singular values s of W / c'; so s - 3 alpha² s⁵ + ….

    alpha: chosen after every step so that the largest singular value that the step can have made, w_max (1 - lr wd) +
    lr update_norm, comes back to w_max. So singular values stay below w_max c without being computed, by four products
    of matrices, and small ones hardly move. It takes an lr update_norm of at most 0.3 w_max: beyond, the cap falls
    near the bound, and what is smaller ends above it. A fixed `alpha` works without knowing the step, and bounds
    nothing.

    The bound holds for steps lr · c · O with the singular values of O below update_norm, c = sqrt(fan_out / fan_in).
    That is Muon with optimizer.scale=ratio; update_norm is 1 for six steps with the coefficients SIX of
    trainkit.projection.spectral, 1.21 for its default five steps, and 1.14502 · 1.05 in the authors' NanoGPT, with
    five other triples in bfloat16. Under another optimizer the cap is a pull towards the bound.

    coupling: "exact" counts the update in the units in which p works. "released" is the authors' other code: update
    lr update_norm / c and w_max as they are, even where c' = c w_max, so that the bound is only approximate unless
    w_max = 1 and c = 1; and alpha at most 1, and 1 where a step cannot leave the bound.
    """

    def __init__(
        self,
        *,
        w_max: float = 1.0,
        sensitive_to_wmax: bool = True,
        alpha: float | None = None,
        update_norm: float = 1.0,
        coupling: str = "exact",
        rms_max: float | None = 1.0,
        start: str = "clip",
    ):
        super().__init__(w_max=w_max, sensitive_to_wmax=sensitive_to_wmax, rms_max=rms_max, start=start)
        if coupling not in ("exact", "released"):
            raise ValueError(f"projection.coupling is exact or released; got {coupling!r}")
        for key, value in (("alpha", alpha or 0.0), ("update_norm", update_norm)):
            if not value >= 0:
                raise ValueError(f"projection.{key} must not be negative; got {value}")
        self.alpha, self.update_norm, self.coupling = alpha, update_norm, coupling
        self.step_of: dict[nn.Parameter, tuple[float, float]] = {}  # lr and weight decay of the step just taken

    def bound(self) -> float:
        return 1.0 if self.sensitive_to_wmax else self.w_max

    def project(self, model: nn.Module) -> None:
        if self.alpha is None:
            self.step_of = steps(self.optimizer)
        super().project(model)
        self.step_of = {}

    def setting(self, p: nn.Parameter) -> Hashable:
        return None if self.alpha is not None else self.step_of.get(p, (0.0, 0.0))

    def constrain(self, w: Tensor, unit: float, setting: Hashable) -> Tensor:
        alpha = self.alpha
        if alpha is None:
            lr, decay = setting  # type: ignore[misc]
            if self.coupling == "released":
                alpha = released_coupling(self.w_max, lr * decay, lr * self.update_norm / scale(w))
            else:
                alpha = coupling(self.bound(), lr * decay, lr * self.update_norm * scale(w) / unit)
        return soft_cap(w, alpha, unit) if alpha else w


def steps(optimizer: Optimizer | None) -> dict[nn.Parameter, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter that an optimizer steps."""
    if optimizer is None:
        raise ValueError(
            "projection=soft_cap is coupled to the learning rate: call its prepare(optimizer) before training, "
            "or set projection.alpha"
        )
    return {
        p: (float(group["lr"]), float(group.get("weight_decay", 0.0)))
        for group in optimizer.param_groups
        for p in group["params"]
    }
