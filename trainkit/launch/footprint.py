"""What a run takes: its model, its optimizer's state, and its computation."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim import Optimizer

from trainkit.plan.ledger import storages
from trainkit.task.base import Task


def footprint(task: Task, optimizers: Iterable[Optimizer], steps: int) -> dict[str, int]:
    """parameters: trainable numbers of the model; optimizer_state_bytes: what the state of this process occupies;
    training_flops: of all `steps`, forward and backward, where the model counts them (flops_per_token).
    """
    found = {
        "parameters": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        "optimizer_state_bytes": state_bytes(optimizers),
    }
    if task.flops_per_token and task.tokens_per_step:
        found["training_flops"] = task.flops_per_token * task.tokens_per_step * steps
    return found


def state_bytes(optimizers: Iterable[Optimizer]) -> int:
    """The bytes of all tensors in the optimizers' states; memory that several share counts once, views in full."""
    return sum(storages([list(optimizer.state.values()) for optimizer in optimizers]).values())
