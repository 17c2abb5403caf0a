"""NaP, normalize and project (Lyle et al., NeurIPS 2024, arXiv:2407.01800): weights keep the norm they started with."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.optimizer.multi_tensor import wide
from trainkit.optimizer.partition import role
from trainkit.projection.projection import Projection

MATRICES = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


class NaP(Projection):
    """W <- rho W / ‖W‖ for every weight of linear layers, embeddings and convolutions; rho its norm before training.

    ‖·‖ is the Frobenius norm of one layer's weight. Where a norm follows, f(c W) = f(W), so gradients are orthogonal to
    W and scale as 1/‖W‖: without projection ‖W‖ only grows and the effective learning rate, lr/‖W‖² for SGD and lr/‖W‖
    for Adam, only falls, which is how networks lose plasticity. With it the schedule alone sets the rate. norm=nap puts
    norms where the method wants them; weights that are not followed by one, such as those that write to a residual
    stream, are held as well, but there the function changes. Optimizer state is not touched. Memory: one number per
    weight. A weight that was zero at the start has no norm to return to and stays free.

    The output layer (role head, also where it shares the embedding's weight) is not normalized and stays free unless
    `project_output`. project_every=k: after the steps k, 2k, ….
    affine: gains s and offsets o of the norms. none: nothing is done. joint: (s, o) <- (s, o) sqrt(d / (‖s‖² + ‖o‖²)),
    d channels, which keeps the function class where the activation is positively homogeneous, such as ReLU.
    to_init: the loss gets `reg_to_init` · sum((s - 1)² + o²), for every other activation; its strength in the
    paper is not known to us. Norms without such parameters (norm_layer=srms) are the paper's third way.
    There is no official code. Raises ValueError where there is nothing to project.
    """

    def __init__(
        self,
        *,
        project_every: int = 1,
        project_output: bool = False,
        affine: str = "to_init",
        reg_to_init: float = 0.01,
    ):
        super().__init__()
        if project_every < 1:
            raise ValueError(f"projection.project_every is a number of steps, at least 1; got {project_every}")
        if affine not in ("none", "joint", "to_init"):
            raise ValueError(f"projection.affine is none, joint or to_init; got {affine!r}")
        if not reg_to_init >= 0:
            raise ValueError(f"projection.reg_to_init must not be negative; got {reg_to_init}")
        self.project_every, self.project_output = project_every, project_output
        self.affine, self.reg_to_init = affine, reg_to_init
        self.step = 0
        self.norms: dict[str, Tensor] = {}  # 0-d, by the names of the weights

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        weights = self.weights(model)  # frozen ones too, they may be trained later
        self.norms = dict(zip(weights, lengths(list(weights.values())), strict=True))

    @torch.no_grad()
    def project(self, model: nn.Module) -> None:
        self.step += 1
        if self.step % self.project_every:
            return
        weights = {name: p for name, p in self.weights(model).items() if p.requires_grad}
        for name, p in weights.items():
            if self.norms[name].device != p.device:  # after a load
                self.norms[name] = self.norms[name].to(p.device)
        rescale([[p] for p in weights.values()], [self.norms[name] for name in weights])
        if self.affine == "joint":
            pairs = [[p for p in pair if p is not None] for pair in gains(model)]
            rescale(pairs, [pair[0].new_full((), sqrt(pair[0].numel()), dtype=torch.float64) for pair in pairs])

    def penalty(self, model: nn.Module) -> Tensor | float:
        if self.affine != "to_init" or not self.reg_to_init:
            return 0.0
        away = [t.flatten() for gain, offset in gains(model) for t in (gain - 1, offset) if t is not None]
        return self.reg_to_init * torch.cat(away).square().sum() if away else 0.0

    def weights(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is projected, by name."""
        found: dict[nn.Parameter, str] = {}
        outputs: set[nn.Parameter] = set()
        for name, module in model.named_modules():
            if not isinstance(module, MATRICES):
                continue
            p: nn.Parameter = module.weight  # type: ignore[assignment]
            self.refuse_shards(p)
            found.setdefault(p, f"{name}.weight".lstrip("."))
            if role(module, p) == "head":
                outputs.add(p)
        chosen = {name: p for p, name in found.items() if self.project_output or p not in outputs}
        if not chosen:
            raise ValueError(
                "projection=nap needs linear layers, embeddings or convolutions beside the head, the model has none. "
                "Try projection=none"
            )
        return chosen

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self.step, "norms": dict(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step, self.norms = state["step"], dict(state["norms"])


def gains(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter | None]]:
    """(gain, offset or None) of every norm layer that trains its gain: a module with such vectors, none of MATRICES."""
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        gain, offset = own.get("gain", own.get("weight")), own.get("bias")
        if isinstance(module, MATRICES) or gain is None or gain.ndim != 1 or not gain.requires_grad:
            continue
        yield gain, offset if offset is not None and offset.requires_grad else None


def lengths(tensors: list[Any]) -> list[Tensor]:
    """The l2 norm of each tensor, in at least float32."""
    tensors = [t.to(wide(t.dtype)) for t in tensors]
    # In one go, a CPU loses four digits on ten million entries; by rows it takes as long.
    rows = [torch.linalg.vector_norm(t.flatten(1), dim=1) if t.is_cpu and t.ndim > 1 else t for t in tensors]
    return list(torch._foreach_norm(rows))


def rescale(lists: list[list[Any]], targets: list[Tensor]) -> None:
    """Every list of tensors <- itself times its target over their joint l2 norm; zeros and target 0 leave it alone."""
    found: dict[Any, list[int]] = {}
    for i, tensors in enumerate(lists):
        found.setdefault((tensors[0].device, tensors[0].dtype), []).append(i)
    for indices in found.values():
        flat = [t.detach() for i in indices for t in lists[i]]
        norms = iter(lengths(flat))
        joint = torch.stack([torch.stack([next(norms) for _ in lists[i]]).norm() for i in indices])
        target = torch.stack([targets[i] for i in indices]).to(joint.dtype)
        ratios = torch.where((joint > 0) & (target > 0), target / joint, 1.0).unbind()
        factors = [ratio for ratio, i in zip(ratios, indices, strict=True) for _ in lists[i]]
        if wide(flat[0].dtype) != flat[0].dtype:  # the factor is too close to 1 for half precision
            torch._foreach_copy_(flat, torch._foreach_mul([t.to(joint.dtype) for t in flat], factors))
        else:
            torch._foreach_mul_(flat, factors)
