"""AdaB2N, adaptive balance of batch normalization, on a stream of tasks (Lyu et al. 2023, arXiv:2310.08855)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainkit.continual.batch_norms import inherit, replace, settings
from trainkit.continual.strategy import Strategy
from trainkit.norm_layer.adab2n import AdaB2N
from trainkit.norm_layer.task_ids import announce


class AdaB2NStrategy(Strategy):
    """Every BatchNorm becomes an AdaB2N (trainkit/norm_layer/adab2n.py), and the loss gains lambda_reg · sum of R.

    It weighs the tasks in a batch, so it needs a learner that replays, in one forward (learner.forward=joint, the
    default); alone, or with learner.forward=separate, each forward is of one task or of the buffer's mixture only.
    penalty: R of every layer, summed over all training forwards since the last call, hence over those of one
    micro-batch: with k separate forwards per step, k R's of each layer. It counts from task `from_task` on, t0 in the
    paper; there, with ER-ACE, task 0 has none.
    weight, bias, eps and momentum are the replaced layer's, and so are its running statistics, which eta goes on from
    as if it were new: eta_1 = momentum^kappa. sync: of the statistics and of the task counts over ranks, none or mean;
    None: the replaced layer's.
    The authors tune kappa in {0.1, 0.4, 0.7, 1}, lambda_reg in {0.01, 0.1, 1, 10} (Mini-ImageNet {1e-5, 1e-4, 1e-3,
    1e-2}) and from_task in {0, 1} for each benchmark, on its test images; no default is theirs.
    Raises ValueError for a negative lambda_reg, a model without BatchNorm, and a stream of more than `tasks` tasks.
    """

    def __init__(
        self,
        tasks: int,
        *,
        kappa: float = 0.4,
        lambda_reg: float = 0.1,
        from_task: int = 1,
        sync: str | None = "mean",
    ):
        super().__init__()
        if lambda_reg < 0:
            raise ValueError(f"continual.lambda_reg must be at least 0; got {lambda_reg}")
        self.tasks, self.kappa, self.lambda_reg, self.from_task, self.sync = tasks, kappa, lambda_reg, from_task, sync

    def convert(self, model: nn.Module) -> nn.Module:
        options = {"tasks": self.tasks, "kappa": self.kappa, "regularize": self.lambda_reg > 0}

        def balanced(bn: nn.Module) -> AdaB2N:
            given = settings(bn) | ({} if self.sync is None else {"sync": self.sync})
            layer = AdaB2N(bn.num_features, **given, **options)  # type: ignore[arg-type]
            return inherit(layer, bn, "running_mean", "running_var", "num_batches_tracked")

        return replace(model, balanced, key="continual=adab2n")

    def begin_task(self, model: nn.Module, task: int) -> None:
        if task >= self.tasks:
            raise ValueError(
                f"continual.tasks={self.tasks}, but the stream begins task number {task + 1}. "
                "Set continual.tasks to its number of tasks"
            )
        for layer in layers(model):
            layer.cur_tasks.fill_(task)

    def begin_batch(self, model: nn.Module, task_ids: Tensor) -> None:
        announce(model, task_ids)

    def end_task(self, model: nn.Module, task: int) -> None:
        for layer in layers(model):
            layer.cur_tasks.fill_(task + 1)

    def penalty(self, model: nn.Module) -> Tensor | float:
        found = layers(model)
        noted = [penalty for layer in found if (penalty := layer.take_penalty()) is not None]
        if not noted:
            return 0.0
        # Chosen on the device: asking for the task in progress would wait for it.
        return torch.where(found[0].cur_tasks >= self.from_task, self.lambda_reg * torch.stack(noted).sum(), 0.0)


def layers(model: nn.Module) -> list[AdaB2N]:
    return [module for module in model.modules() if isinstance(module, AdaB2N)]
