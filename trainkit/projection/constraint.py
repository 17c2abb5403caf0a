"""Which weights a spectral constraint holds, in which units, and when (Newhouse et al. 2025, arXiv:2507.13338)."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import sqrt

import torch
from torch import Tensor, nn

from trainkit.optimizer.multi_tensor import wide
from trainkit.optimizer.orthogonal import by_shape
from trainkit.optimizer.partition import role
from trainkit.projection.projection import Projection
from trainkit.projection.spectral import orthogonalize, rms_divisor, svd_clip

CACHED = 1 << 18  # elements in a stack on a CPU: 1 MiB in float32


class SpectralConstraint(Projection):
    """W <- c' p(W / c') for every linear matrix, p a map on singular values; vectors of embeddings get an RMS cap.

    c = sqrt(fan_out / fan_in), the spectral norm of a map that keeps the RMS of what goes through it; c' = c w_max with
    `sensitive_to_wmax`, else c. What is a matrix follows from the roles: linear layers, except embeddings and heads. Of
    those the vectors that stand for one entry (the rows of an nn.Embedding and of a head, the columns of a linear
    embedding) are divided by max(1, rms / rms_max); rms_max=None leaves them alone. A weight that is shared has its
    first owner's role. Convolutions and frozen weights stay as they are. Equal shapes are one batch; half precision is
    widened to float32. Nothing is kept between steps.

    start: what the call before training does to the matrices. clip: singular values above the bound come down to it,
    exactly. orthogonal: c · orthogonalize(W), the authors' start, since the W of a new model is drawn at random (bounds
    below c: that times it); it throws away the singular values of loaded weights, so it is not the default. keep:
    nothing.
    Raises ValueError where the model has no such matrix, and for sharded ones.
    """

    def __init__(
        self, *, w_max: float = 1.0, sensitive_to_wmax: bool = True, rms_max: float | None = 1.0, start: str = "clip"
    ):
        super().__init__()
        if start not in ("clip", "orthogonal", "keep"):
            raise ValueError(f"projection.start is clip, orthogonal or keep; got {start!r}")
        for key, value in (("w_max", w_max), ("rms_max", 1.0 if rms_max is None else rms_max)):
            if not value > 0:
                raise ValueError(f"projection.{key} is a bound, above 0; got {value}. Try 1.0")
        self.w_max, self.sensitive_to_wmax = w_max, sensitive_to_wmax
        self.rms_max, self.start = rms_max, start

    def constrain(self, w: Tensor, unit: float, setting: Hashable) -> Tensor:
        """unit · p(w / unit), w: (k, m, n) matrices of one `setting`."""
        raise NotImplementedError

    def setting(self, p: nn.Parameter) -> Hashable:
        """What a matrix must share with others, beside its shape, to be in one batch with them."""
        return None

    def bound(self) -> float:
        """The largest singular value that p allows, in its own units."""
        return 1.0

    def unit(self, w: Tensor) -> float:
        """c' of a matrix."""
        return scale(w) * (self.w_max if self.sensitive_to_wmax else 1.0)

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        matrices, vectors = self.weights(model)
        self.cap(vectors)
        if self.start == "clip":
            rewrite(matrices, lambda w: svd_clip(w, self.bound(), self.unit(w)))
        elif self.start == "orthogonal":
            rewrite(matrices, lambda w: orthogonalize(w) * min(scale(w), self.bound() * self.unit(w)))

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        matrices, vectors = self.weights(model)
        self.cap(vectors)
        alike: dict[Hashable, list[nn.Parameter]] = {}
        for p in matrices:
            alike.setdefault(self.setting(p), []).append(p)
        for setting, ps in alike.items():
            rewrite(ps, lambda w, setting=setting: self.constrain(w, self.unit(w), setting))

    def cap(self, vectors: list[tuple[nn.Parameter, int]]) -> None:
        if self.rms_max is not None:
            for p, axis in vectors:
                p.div_(rms_divisor(p, axis=axis, limit=self.rms_max))

    def weights(self, model: nn.Module) -> tuple[list[nn.Parameter], list[tuple[nn.Parameter, int]]]:
        """The matrices, and the weights that are lists of vectors with the axis along these."""
        matrices: list[nn.Parameter] = []
        vectors: list[tuple[nn.Parameter, int]] = []
        seen: set[nn.Parameter] = set()
        for module in model.modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            p: nn.Parameter = module.weight  # type: ignore[assignment]
            if p in seen or not p.requires_grad:
                continue
            seen.add(p)
            self.refuse_shards(p)
            kind = role(module, p)
            if kind in ("embed", "head") or isinstance(module, nn.Embedding):
                vectors.append((p, 0 if kind == "embed" and isinstance(module, nn.Linear) else -1))
            else:
                matrices.append(p)
        if not matrices:
            raise ValueError(
                f"{self.word} needs linear layers beside embeddings and head, the model has none. Try projection=none"
            )
        return matrices, vectors


def at_least_one(iterations: int) -> int:
    if iterations < 1:
        raise ValueError(f"projection.iterations must be at least 1; got {iterations}. Try 16")
    return iterations


def scale(w: Tensor) -> float:
    """c = sqrt(fan_out / fan_in) of (…, fan_out, fan_in)."""
    return sqrt(w.shape[-2] / w.shape[-1])


def rewrite(ps: list[nn.Parameter], change: Callable[[Tensor], Tensor]) -> None:
    """p <- change(p) for matrices of any shapes, those of one shape in stacks; on a CPU in such as fit its cache."""
    on_cpu, elsewhere = ([p for p in ps if p.is_cpu is there] for there in (True, False))
    batches = [(on_cpu, indices) for indices in by_shape(on_cpu, elements=CACHED)]
    batches += [(elsewhere, indices) for indices in by_shape(elsewhere)]
    for ps, indices in batches:
        chosen = [ps[i].detach() for i in indices]
        stack = torch.stack(chosen) if len(chosen) > 1 else chosen[0].unsqueeze(0)
        torch._foreach_copy_(chosen, list(change(stack.to(wide(stack.dtype))).unbind(0)))
