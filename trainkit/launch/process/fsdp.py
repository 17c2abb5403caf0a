"""trainer=fsdp: every process holds a share of each weight, gradient and moment; of a block all, while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from trainkit.launch.sharded_checkpoint import SEAL, ShardedTensor, place, read, whole, write
from trainkit.measure.shards import is_sharded
from trainkit.model.parts.recompute import blocks_of
from trainkit.task.base import Task
from trainkit.task.continual import ContinualClassification

CHECKPOINTS = ("full", "sharded")


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes: each block of the model is a unit of its own, what is left (embedding, head) another.

    A unit is gathered before it runs and its gradients are averaged into shares behind its backward, micro-batch by
    micro-batch. With reshard_after_forward the gathered weights of a block are dropped between its forward and its
    backward (ZeRO-3), else kept (ZeRO-2: more memory, less traffic).

    bf16-mixed is autocast, as on one device, so the stream between blocks stays float32; the weights of blocks travel
    in bfloat16, which for matrices is what autocast would make of them, gradients are averaged in float32, and shares
    and optimizer state are float32. Gains and biases of blocks are rounded to bfloat16 where they are used, which
    autocast alone would not do.

    checkpoint="full": that of any other trainer, one file of whole tensors, which rank 0 gathers one by one in its
    memory and writes. The price: the host of rank 0 holds weights and optimizer state once, 12 bytes per parameter
    under AdamW. checkpoint="sharded": every process writes its own rows, at once, and nothing is gathered
    (trainkit/launch/sharded_checkpoint.py); the folder must be one that all machines share. Either is read by every
    trainer, with any number of processes, and by mode=eval, sample and export. While a run starts each process holds
    all weights.

    Buffers are whole everywhere; those that a checkpoint holds are rank 0's at every forward, as under DDP. Raises
    ValueError for what cannot be sharded.
    """

    def __init__(self, *, reshard_after_forward: bool = True, checkpoint: str = "full"):
        super().__init__(save_distributed_checkpoint=False)
        if checkpoint not in CHECKPOINTS:
            raise ValueError(f"trainer.checkpoint is one of {', '.join(CHECKPOINTS)}; got {checkpoint!r}")
        self.reshard_after_forward, self.sharded_checkpoint = reshard_after_forward, checkpoint == "sharded"
        self._mine: dict[str, Tensor] = {}  # what this process keeps of the checkpoint that is being made
        self._optimizers_kept = 0

    # Weights are loaded while they are whole, so as under any other strategy.
    restore_checkpoint_after_setup = False  # type: ignore[assignment]
    lightning_restore_optimizer = True  # type: ignore[assignment]

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        if self._data_parallel_size == 1:
            raise ValueError(
                "trainer=fsdp shards over several devices, and there is one. Try trainer=gpu or trainer=cpu"
            )
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        assert isinstance(self.lightning_module, Task)
        self.accelerator.setup(trainer)
        if not isinstance(self.lightning_module.model, FSDPModule):  # a test follows the training
            refuse(self.lightning_module)
            self.model = self.precision_plugin.convert_module(self.lightning_module)
            words = {"precision": self.precision_plugin.precision, "reshard_after_forward": self.reshard_after_forward}
            shard(self.lightning_module.model, self.device_mesh["data_parallel"], **words)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            for optimizer in self.optimizers:
                unfuse(optimizer)
        self.setup_precision_plugin()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the task. What is sharded: whole on the CPU of rank 0 and left out elsewhere, or places."""
        assert self.lightning_module is not None
        self._mine, self._optimizers_kept = {}, 0
        state = self.lightning_module.state_dict()
        names = dict(self.lightning_module.named_parameters(remove_duplicate=False))
        kept: dict[Any, Any] = {}  # by parameter: a tied one is gathered, and written, once
        for name, value in state.items():
            if isinstance(value, DTensor):
                key = names.get(name, name)
                if key not in kept:
                    kept[key] = self._kept(name, value)
                state[name] = kept[key]
        return {name: value for name, value in state.items() if value is not None}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The same for an optimizer."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        state = optimizer.state_dict()
        state["state"] = {number: self._kept_of(number, one) for number, one in state["state"].items()}
        self._optimizers_kept += 1
        for group in state["param_groups"]:  # another trainer takes the kernels that were configured
            group |= {key: optimizer.defaults[key] for key in ("fused", "foreach") if key in optimizer.defaults}
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.sharded_checkpoint:
            save: Any = self.checkpoint_io.save_checkpoint
            checkpoint[SEAL] = write(self._mine, Path(filepath), checkpoint["global_step"], save)
            self._mine = {}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Mapped, not read: the processes of a machine share what they look at, and keep only their shares of it."""
        return read(Path(checkpoint_path), lazily=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        state, own = dict(checkpoint["state_dict"]), self.lightning_module.state_dict()
        for name, value in state.items():
            if isinstance(value, ShardedTensor) and name in own and own[name].shape == value.shape:
                value.copy_to(own[name])
                state[name] = own[name]
        self.lightning_module.load_state_dict(whole(state), strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Every process takes its share of the tensors, which all of them can read."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [p for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in saved["param_groups"] for i in group["params"]]
            like = dict(zip(numbers, params, strict=True))
            state = {i: {k: share_of(v, like[i]) for k, v in of_one.items()} for i, of_one in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})
            unfuse(optimizer)

    def _kept_of(self, number: int, state: Mapping[str, Any]) -> dict[str, Any]:
        prefix = f"optimizer.{self._optimizers_kept}.{number}"
        return {k: self._kept(f"{prefix}.{k}", v) if isinstance(v, DTensor) else v for k, v in state.items()}

    def _kept(self, name: str, value: DTensor) -> Any:
        """What a checkpoint holds of a sharded tensor; all processes must ask alike."""
        if self.sharded_checkpoint:
            self._mine[name] = value.to_local().detach().cpu()
            return place(name, value.shape)
        full = value.full_tensor().detach()
        return full.cpu() if self.is_global_zero else None


def shard(model: nn.Module, mesh: DeviceMesh, *, precision: str, reshard_after_forward: bool = True) -> None:
    """Shards a model over the processes of `mesh`, in place; block by block, so its device never holds all of it."""
    half = torch.float32 if precision.startswith("bf16") else None
    whole = of_blocks = MixedPrecisionPolicy(reduce_dtype=half)
    if precision == "bf16-mixed":
        of_blocks = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=of_blocks)
    fully_shard(model, mesh=mesh, mp_policy=whole)
    kept = set(model.state_dict())
    buffers = [name for name, _ in model.named_buffers() if name in kept]
    if buffers:
        model.register_forward_pre_hook(lambda *_: share([model.get_buffer(name) for name in buffers]))


def unfuse(optimizer: Optimizer) -> None:
    """Takes the multi-tensor kernels where torch's fused ones know no shards, which is in SGD and Adagrad."""
    for group in optimizer.param_groups:
        if group.get("fused") and "betas" not in group and any(is_sharded(p) for p in group["params"]):
            group["fused"], group["foreach"] = False, True


def refuse(task: Task) -> None:
    """Raises ValueError for what needs whole weights, or cannot be sharded."""
    if isinstance(task, ContinualClassification):
        raise ValueError(
            "trainer=fsdp shards the weights that the learners of a task stream copy and compare. Try trainer=ddp"
        )
    scalars = [name for name, p in task.model.named_parameters() if p.ndim == 0]
    if scalars:
        raise ValueError(
            f"trainer=fsdp shards along the first axis, and {scalars[0]} is a single number. Try trainer=ddp"
        )


def share_of(value: Any, parameter: nn.Parameter) -> Any:
    """This process's share of a state shaped like its sharded parameter; anything else as it is."""
    if not isinstance(value, Tensor | ShardedTensor):
        return value
    if not (isinstance(parameter, DTensor) and is_sharded(parameter) and value.shape == parameter.shape):
        return whole(value)
    if isinstance(value, Tensor):
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    mesh, placements = parameter.device_mesh, parameter.placements
    size, first = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    rows = value.rows(first[0], size[0]).to(parameter.device, copy=True)  # what is mapped must not be written to
    return DTensor.from_local(rows, mesh, placements, shape=value.shape, stride=parameter.stride())


@torch.no_grad()
def share(buffers: list[Tensor]) -> None:
    """Gives every process what rank 0 has; one transfer per dtype."""
    alike: dict[torch.dtype, list[Tensor]] = {}
    for buffer in buffers:
        alike.setdefault(buffer.dtype, []).append(buffer)
    for same in alike.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in same])
        distributed.broadcast(flat, 0)
        pieces = flat.split([buffer.numel() for buffer in same])
        torch._foreach_copy_(same, [piece.view_as(buffer) for piece, buffer in zip(pieces, same, strict=True)])
