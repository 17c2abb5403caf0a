"""AGVM: modules with noisier gradients take smaller steps (Xue et al., NeurIPS 2022, arXiv:2210.11078)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.gradient.clip import Clip
from trainkit.measure.shards import is_sharded
from trainkit.measure.sites import sites

FLOOR, LEAST, MOST = 1e-6, 0.5, 10.0  # of Φ, and the limits of its ratio, as in the released code


class AGVM:
    """Module i steps with lr · s_i. Every `interval` steps from `start` on, s_i <- μ s_i + (1 - μ) f_i, from 1, with

        Φ_i = 1 - cos(a_i, b_i),   f_i = sqrt(clamp((Φ_0 + 1e-6) / (Φ_i + 1e-6), 0.5, 10)),

    a_i, b_i the mean gradients of module i (all its tensors as one vector) over the two halves of the batch, and module
    0 the reference, whose s stays 1. With Adam (an optimizer that keeps exp_avg_sq = v of a parameter's shape; adam
    says so or not, null looks) each half's part x of the gradient is first made x / (sqrt(β2 v + (1 - β2) x²) + eps),
    v as the step before left it. x is half the half's mean, as in the released code with two workers; with more of
    them that code divides further, which changes the result with their number, and we do not. For batches so large that
    layers disagree on the learning rate. μ: momentum; after the step `stop` all modules step with lr again.

    modules: {name: [parameters, or beginnings of their dotted names]}, the first being the reference; null: embed (all
    that stands before the blocks), blocks.0, blocks.1, …, head (what stands behind them). max_norm clips the whole
    gradient by its norm, after the halves were compared; clip_steps: [first, last] step of it, null all.

    The step is scaled afterwards, W <- W_old + s_i (W - W_old), which for SGD, Adam and all whose step is proportional
    to lr, decay and momentum included, is the step with lr · s_i. It needs neither groups by module nor to wait for the
    device, but a copy of the weights, 4 bytes per parameter, and the two halves in the steps that compare. s is all
    that lasts, in `state_dict`. Where Φ is not finite s_i stays what it was.
    """

    def __init__(
        self,
        interval: int = 5,
        start: int = 500,
        stop: int | None = None,
        momentum: float = 0.97,
        *,
        adam: bool | None = None,
        modules: Mapping[str, Sequence[str]] | None = None,
        max_norm: float | None = None,
        clip_steps: Sequence[int] | None = None,
    ):
        if interval < 1:
            raise ValueError(f"gradient.interval must be at least 1; got {interval}")
        if not 0 <= momentum < 1:
            raise ValueError(f"gradient.momentum must lie in [0, 1); got {momentum}")
        if stop is not None and stop < start:
            raise ValueError(f"gradient.stop={stop} lies before gradient.start={start}; null never stops")
        if clip_steps is not None and (len(clip_steps) != 2 or clip_steps[0] > clip_steps[1]):
            raise ValueError(f"gradient.clip_steps is [first, last], or null; got {list(clip_steps)}")
        self.interval, self.start, self.stop, self.momentum = interval, start, stop, momentum
        self.adam, self.modules = adam, modules
        self.clip = None if max_norm is None else Clip(max_norm)
        self.clip_steps = clip_steps
        self.step = 0
        self.scales: Tensor | None = None  # s, (modules,)
        self._half: tuple[list[Tensor], float] | None = None
        self._before: list[list[Tensor]] = []  # the weights of all modules but the reference
        self._kept = False

    # --- what the trainer calls -------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Before training: sorts the parameters by module, and follows the optimizer's steps."""
        self.optimizer = optimizer
        self.parameters = list(model.parameters())
        if any(is_sharded(p) for p in self.parameters):
            raise ValueError(
                "gradient=agvm compares the gradients of whole modules, and the parameters are sharded. "
                "Try trainer=ddp, or gradient=clip"
            )
        named = by_beginning(model, self.modules) if self.modules else by_depth(model)
        self.names, self._before = list(named), []
        self.members = list(named.values())
        place = {p: i for i, members in enumerate(self.members) for p in members}
        self.owner = [place.get(p, -1) for p in self.parameters]  # -1: frozen
        if self.scales is not None and len(self.scales) != len(self.names):
            raise ValueError(
                f"gradient=agvm goes on with scales of {len(self.scales)} modules, and gradient.modules makes "
                f"{len(self.names)}: {', '.join(self.names)}. Leave it as it was"
            )
        optimizer.register_step_pre_hook(self._keep)
        optimizer.register_step_post_hook(self._scale)

    def begin_step(self, step: int) -> bool:
        """Announces the optimizer step, counted from 1. True asks for `first_half`."""
        self.step = step
        return self._acts() and step % self.interval == 0

    def first_half(self, gradients: list[Tensor], share: float) -> None:
        """The mean gradient of a part of the batch, its `share`; one for each of model.parameters()."""
        self._half = gradients, share

    def __call__(self, gradients: list[Tensor]) -> dict[str, Tensor]:
        if self.scales is None:
            self.scales = gradients[0].new_ones(len(self.names), dtype=wide(gradients[0]))
        self.scales = self.scales.to(gradients[0].device)
        if self._half is not None:
            self._compare(*self._half)
            self._half = None
        scales = self.scales.unbind() if self._acts() else ()
        said = {f"agvm/{name}": s for name, s in zip(self.names, scales, strict=False)}
        if self.clip is not None and (self.clip_steps is None or self.clip_steps[0] <= self.step <= self.clip_steps[1]):
            said |= self.clip(gradients)
        return said

    def state_dict(self) -> dict[str, Any]:
        return {} if self.scales is None else {"scales": self.scales}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scales = state.get("scales")

    # --- the method -------------------------------------------------------------------------------------------------

    def _acts(self) -> bool:
        return self.start <= self.step and (self.stop is None or self.step <= self.stop)

    def _compare(self, first: list[Tensor], share: float) -> None:
        """Moves s by what the halves a (given) and b (what is left of the gradient) of the batch say."""
        rows = [i for i, p in enumerate(self.parameters) if p.grad is not None and self.owner[i] >= 0]
        whole = [widened(self.parameters[i].grad) for i in rows]
        # As parts of the mean gradient, which is their sum.
        a = list(torch._foreach_mul([widened(first[i]) for i in rows], share))
        b = list(torch._foreach_sub(whole, a))
        if self.adam is not False:
            self._precondition(rows, a, b)
        assert self.scales is not None
        owners = torch.tensor([self.owner[i] for i in rows]).to(self.scales.device, non_blocking=True)

        def squares(values: Sequence[Tensor]) -> Tensor:
            """Σ x² of each module."""
            each = torch.stack(torch._foreach_norm(list(values))).square().to(self.scales)
            return torch.zeros_like(self.scales).index_add_(0, owners, each)

        product = (squares(torch._foreach_add(a, b)) - squares(torch._foreach_sub(a, b))) / 4
        lengths = (squares(a) * squares(b)).sqrt()
        noise = 1 - product / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
        ratios = ((noise[0] + FLOOR) / (noise + FLOOR)).clamp(LEAST, MOST).sqrt()
        moved = self.scales.lerp(ratios, 1 - self.momentum)
        self.scales = torch.where(ratios.isfinite(), moved, self.scales)

    def _precondition(self, rows: list[int], a: list[Tensor], b: list[Tensor]) -> None:
        """x <- x / (sqrt(β2 v + (1 - β2) x²) + eps) for the parameters that Adam steps."""
        where = {self.parameters[i]: j for j, i in enumerate(rows)}
        for group in self.optimizer.param_groups:
            members = [p for p in group["params"] if p in where]
            averages = [self.optimizer.state.get(p, {}).get("exp_avg_sq") for p in members]
            if self.adam:  # before the first step v is 0
                averages = [torch.zeros_like(p) if v is None else v for p, v in zip(members, averages, strict=True)]
            found = zip(members, averages, strict=True)
            chosen = [(where[p], v) for p, v in found if v is not None and v.shape == p.shape]
            if not chosen:
                continue
            if not {"betas", "eps"} <= group.keys():
                raise ValueError("gradient.adam=true needs an optimizer with betas and eps, such as optimizer=adamw")
            beta2, v = group["betas"][1], [widened(v) for _, v in chosen]
            for x in (a, b):
                part = [x[j] for j, _ in chosen]
                size = torch._foreach_mul(part, part)
                torch._foreach_mul_(size, 1 - beta2)
                torch._foreach_add_(size, v, alpha=beta2)
                torch._foreach_sqrt_(size)
                torch._foreach_add_(size, group["eps"])
                for (j, _), value in zip(chosen, torch._foreach_div(part, size), strict=True):
                    x[j] = value

    @torch.no_grad()
    def _keep(self, *_: Any) -> None:
        """Before the optimizer's step: copies the weights, into memory that is kept."""
        self._kept = self._acts()
        if self._kept:
            if not self._before:
                self._before = [[torch.empty_like(p) for p in members] for members in self.members[1:]]
            for members, before in zip(self.members[1:], self._before, strict=True):
                torch._foreach_copy_(before, [*members])

    @torch.no_grad()
    def _scale(self, *_: Any) -> None:
        """After it: W <- W + (s - 1)(W - W_old), which leaves W as it is, bit for bit, where s is 1."""
        if self._kept and self.scales is not None:
            for members, before, s in zip(self.members[1:], self._before, self.scales[1:].unbind(), strict=True):
                weights: list[Tensor] = [*members]
                torch._foreach_sub_(before, weights)
                torch._foreach_mul_(before, 1 - s)
                torch._foreach_add_(weights, before)
        self._kept = False


def by_depth(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """embed, blocks.0, …, head of a model with blocks; of another, what measure.sites tells apart."""
    found = sites(model)
    if not any(label.startswith("blocks.") for label in found):
        return found
    modules: dict[str, list[nn.Parameter]] = {"embed": []}
    for label, parameters in found.items():
        block = ".".join(label.split(".")[:2])
        name = block if label.startswith("blocks.") else "head" if label in ("head", "norm") else "embed"
        modules.setdefault(name, []).extend(parameters)
    modules["head"] = modules.pop("head", [])
    return {name: parameters for name, parameters in modules.items() if parameters}


def by_beginning(model: nn.Module, modules: Mapping[str, Sequence[str]]) -> dict[str, list[nn.Parameter]]:
    """The trainable parameters that each entry names. ValueError where one is named twice or not at all."""
    found: dict[str, list[nn.Parameter]] = {name: [] for name in modules}
    for path, parameter in model.named_parameters():
        owners = [m for m, starts in modules.items() if any(path == s or path.startswith(f"{s}.") for s in starts)]
        if len(owners) != 1 and parameter.requires_grad:
            raise ValueError(f"gradient.modules must name every parameter once; {path} is in {owners or 'none'}")
        if parameter.requires_grad:
            found[owners[0]].append(parameter)
    empty = [name for name, parameters in found.items() if not parameters]
    if empty:
        raise ValueError(f"gradient.modules: no parameter begins as {empty[0]} says, {list(modules[empty[0]])}")
    return found


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def widened(x: Tensor | None) -> Tensor:
    assert x is not None
    return x.to(wide(x))
