"""AdaGrad-Norm: one learning rate for everything, from the gradient norms so far (Ward et al. 2019,
arXiv:1806.01811)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainkit.optimizer.multi_tensor import Bucket, MultiTensorOptimizer, Tensors, add, run, wide, zeros_like
from trainkit.optimizer.norms import norms

FORMS = ("scalar", "row")


class AdaGradNorm(MultiTensorOptimizer):
    """b² <- b² + ‖g‖², then W <- (1 - lr_t λ) W - lr_t g / b, with lr_t = lr / (1 + (t - 1) lr_decay).

    form="scalar": one b for all parameters of all groups, ‖g‖ the norm of all gradients, as in the paper. form="row":
    one b for every row of a matrix and every filter of a convolution, and W moves by g / (b + ε); in parameters with
    one axis each entry is a row of its own. b² starts at initial_accumulator_value. With a momentum μ the step is along
    c <- μ c + (1 - μ) g instead of g. Needs no tuning to the scale of the gradients: the steps fall as 1/√t on noise.
    State: sum, 4 bytes per parameter tensor (its share of b²; b itself is their sum) or per row; with a momentum
    4 bytes per parameter more (momentum_buffer).
    "row" is the form of the authors of AdAdaGrad (Lau et al. 2024, arXiv:2402.11215), with three differences: theirs
    adds to the sums of a bias those of the matrix visited before it, stores the sums in full size, and its decay
    subtracts a multiple of the gradient where here it shrinks W.
    """

    whole = True

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        form: str = "scalar",
        initial_accumulator_value: float = 0.01,
        momentum: float = 0.0,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
        compile: bool = False,
    ):
        settings = {"lr": lr, "form": form, "initial_accumulator_value": initial_accumulator_value}
        settings |= {"momentum": momentum, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, settings, maximize=maximize, compile=compile)
        forms = {group["form"] for group in self.param_groups}
        if len(forms) > 1 or not forms <= set(FORMS):
            raise ValueError(
                f"optimizer.form is one of {', '.join(FORMS)}, for all groups the same; got {sorted(forms)}"
            )

    def begin(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if group["form"] == "scalar":
            sums = torch.zeros((), dtype=wide(p.dtype), device=p.device)
        else:
            start, rows = group["initial_accumulator_value"], p.shape[:1]
            sums = torch.full(rows, start, dtype=wide(p.dtype), device=p.device)
        return {"sum": sums, **({"momentum_buffer": zeros_like(p)} if group["momentum"] else {})}

    def update_all(self, found: list[tuple[Bucket, dict[str, Any]]]) -> None:
        scalar = self.param_groups[0]["form"] == "scalar"
        b = self.accumulate(found) if scalar and found else None
        for bucket, group in found:
            lr = group["lr"] / (1 + (bucket.step - 1) * group["lr_decay"])
            buffers = [bucket.state("momentum_buffer")] if group["momentum"] else []
            now = {"shrink": lr * group["weight_decay"]}
            fixed = {"decays": group["weight_decay"] != 0, "momentum": group["momentum"], "compile": group["compile"]}
            if b is not None:
                rate = torch.where(b > 0, lr / b, 0.0).to(bucket.params[0].device)
                each = {"rate": [rate] * len(bucket.params)}
                run(together, bucket.params, bucket.gradients, *buffers, now=now, each=each, **fixed)
            else:
                lists = bucket.params, bucket.gradients, bucket.state("sum"), *buffers
                run(by_row, *lists, now={"lr": lr, **now}, rows=True, eps=group["eps"], **fixed)

    def accumulate(self, found: list[tuple[Bucket, dict[str, Any]]]) -> Tensor:
        """Adds the gradients to each parameter's share of b²; returns b, 0-d. Parameters without a gradient count."""
        for bucket, _ in found:
            torch._foreach_add_(bucket.state("sum"), list(norms(bucket.gradients).square().unbind()))
        shares: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        states = [self.state[p] for group in self.param_groups for p in group["params"] if p in self.state]
        for state in states:
            shares.setdefault((state["sum"].device, state["sum"].dtype), []).append(state["sum"])
        parts = [torch.stack(part).sum() for part in shares.values()]
        total = torch.stack([part.to(parts[0]) for part in parts]).sum()
        return (total + self.param_groups[0]["initial_accumulator_value"]).sqrt()


def together(
    w: Tensors,
    g: Tensors,
    c: Tensors | None = None,
    *,
    rate: Tensors,
    shrink: float,
    decays: bool,
    momentum: float,
) -> None:
    move(w, along(g, c, momentum), rate, shrink, decays)


def by_row(
    w: Tensors,
    g: Tensors,
    sums: Tensors,
    c: Tensors | None = None,
    *,
    lr: float,
    shrink: float,
    decays: bool,
    momentum: float,
    eps: float,
) -> None:
    lengths = [torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in g]
    torch._foreach_addcmul_(sums, lengths, lengths)
    b = torch._foreach_sqrt(sums)
    torch._foreach_add_(b, eps)
    rate = torch._foreach_reciprocal([t.clamp(min=torch.finfo(t.dtype).tiny) for t in b])
    torch._foreach_mul_(rate, lr)
    move(w, along(g, c, momentum), rate, shrink, decays)


def along(g: Tensors, c: Tensors | None, momentum: float) -> Tensors:
    if c is None:
        return g
    torch._foreach_lerp_(c, g, 1 - momentum)
    return c


def move(w: Tensors, u: Tensors, rate: Tensors, shrink: float, decays: bool) -> None:
    """W <- W - shrink W - rate u."""
    if decays:
        add(w, w, -shrink)
    torch._foreach_addcmul_(w, u, rate, value=-1)
