"""trainer=ddp: every process holds the whole model, and gradients are averaged over them."""

from __future__ import annotations

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel


class DataParallel(DDPStrategy):
    """Lightning's, with a compression that works on every device whose backend can add bfloat16.

    gradient_compression="bf16": gradients travel, and are added, in bfloat16: half the traffic, and 8 bits of each.
    Of accumulated micro-batches only the last one's backward averages. Raises ValueError where the backend cannot add.
    """

    def __init__(
        self,
        *,
        static_graph: bool = False,
        find_unused_parameters: bool = False,
        gradient_as_bucket_view: bool = True,
        bucket_cap_mb: float = 25,
        gradient_compression: str = "none",
    ):
        super().__init__(
            static_graph=static_graph,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=gradient_as_bucket_view,
            bucket_cap_mb=bucket_cap_mb,
        )
        self.gradient_compression = gradient_compression

    def configure_ddp(self) -> None:
        super().configure_ddp()
        if self.gradient_compression == "bf16":
            assert isinstance(self.model, DistributedDataParallel)
            check_bfloat16(self.root_device)
            self.model.register_comm_hook(None, halved)


def halved(group, bucket):  # DDP compares annotations with types, and here they are texts
    """torch's hook, which DDP would refuse by its name on every backend but NCCL."""
    return bf16_compress_hook(group, bucket)


def check_bfloat16(device: torch.device) -> None:
    """Raises ValueError where the processes cannot add bfloat16."""
    try:
        distributed.all_reduce(torch.zeros(1, dtype=torch.bfloat16, device=device))
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"trainer.gradient_compression=bf16: {distributed.get_backend()} on this machine cannot add bfloat16 "
            f"({str(error).splitlines()[0]}). Try trainer.gradient_compression=none"
        ) from error
