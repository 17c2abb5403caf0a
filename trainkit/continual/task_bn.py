"""Task-specific batch normalization: each task of a stream has a set of its own."""

from __future__ import annotations

from torch import Tensor, nn

from trainkit.continual.batch_norms import copy, replace, settings
from trainkit.continual.strategy import Strategy
from trainkit.norm_layer.task_batch import TaskBatchNorm
from trainkit.norm_layer.task_ids import announce

SCENARIOS = ("class", "task", "domain")


class TaskBatchNormStrategy(Strategy):
    """Every BatchNorm becomes a TaskBatchNorm (trainkit/norm_layer/task_batch.py): one weight, bias, running mean and
    running var per task, all starting as the replaced layer's; eps and momentum are its own too.

    In training each sample, replayed or not, uses and updates the set of its task. At evaluation this is a method for
    scenario=task, where the task of a sample is given: it uses that task's set. In scenario=class and domain the task
    is what a model is not told, so all samples are evaluated by the set of the task trained last; accuracies on earlier
    tasks then say what the sets cost, not what they are good for (the accuracies within tasks, task_il/…, that
    scenario=class logs beside, come from the same outputs).
    With learner.forward=joint and separate the sets see the same samples per task only if the forwards do not share
    any. Raises ValueError for a model without BatchNorm, an unknown scenario and a stream of more than `tasks` tasks.
    """

    def __init__(self, tasks: int, *, scenario: str = "task"):
        super().__init__()
        if scenario not in SCENARIOS:
            raise ValueError(f"continual.scenario must be one of {', '.join(SCENARIOS)}; got {scenario!r}")
        self.tasks, self.scenario = tasks, scenario

    def convert(self, model: nn.Module) -> nn.Module:
        def per_task(bn: nn.Module) -> TaskBatchNorm:
            layer = TaskBatchNorm(bn.num_features, tasks=self.tasks, **settings(bn))  # type: ignore[arg-type]
            layer.to(bn.weight.device, bn.weight.dtype).train(bn.training)  # type: ignore[arg-type, union-attr]
            for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                copy(getattr(bn, name), getattr(layer, name))
            return layer

        return replace(model, per_task, key="continual=task_bn")

    def begin_task(self, model: nn.Module, task: int) -> None:
        if task >= self.tasks:
            raise ValueError(
                f"continual.tasks={self.tasks}, but the stream begins task number {task + 1}. "
                "Set continual.tasks to its number of tasks"
            )
        for module in model.modules():
            if isinstance(module, TaskBatchNorm):
                module.current.fill_(task)

    def begin_batch(self, model: nn.Module, task_ids: Tensor) -> None:
        told = model.training or self.scenario == "task"
        announce(model, task_ids if told else None)
