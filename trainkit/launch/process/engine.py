"""The strategy that a trainer's plain keys ask for: who holds which weights, and what processes tell each other."""

from __future__ import annotations

from typing import Any

import torch

COMPRESSIONS = ("none", "bf16")
OF_DDP = {
    "static_graph": False,
    "find_unused_parameters": False,
    "gradient_as_bucket_view": True,
    "bucket_cap_mb": 25,
    "gradient_compression": "none",
}
OF_FSDP = {"reshard_after_forward": True, "checkpoint": "full"}
SHARDED_PRECISIONS = ("32-true", "64-true", "bf16-true", "bf16-mixed")


def check_engine(
    strategy: Any,
    precision: str | None,
    devices: Any,
    num_nodes: int,
    *,
    gradient_compression: str,
    bucket_cap_mb: float,
    accumulated: bool,
    static_graph: bool,
) -> None:
    """Raises ValueError for what no machine could do."""
    if gradient_compression not in COMPRESSIONS:
        raise ValueError(f"trainer.gradient_compression is none or bf16; got {gradient_compression!r}")
    if not bucket_cap_mb > 0:
        raise ValueError(f"trainer.bucket_cap_mb must be above 0; got {bucket_cap_mb}. Try 25")
    if static_graph and accumulated:
        raise ValueError(
            "trainer.static_graph=true: torch cannot accumulate micro-batches then. Try trainer.static_graph=false, or "
            "trainer.accumulate_grad_batches=1"
        )
    if strategy == "fsdp" and precision not in (*SHARDED_PRECISIONS, "auto"):
        raise ValueError(f"trainer=fsdp has trainer.precision={', '.join(SHARDED_PRECISIONS)}; got {precision}")
    if strategy == "fsdp" and devices in (1, "1") and num_nodes == 1:
        raise ValueError(
            "trainer=fsdp shards over several devices, and trainer.devices=1. Try trainer=gpu or trainer=cpu"
        )


def engine(strategy: Any, precision: str | None, **options: Any) -> dict[str, Any]:
    """Keywords of lightning.Trainer for a strategy by name, ddp or fsdp with their `options`; any other as it is.

    Raises ValueError for options out of range, and for those of a strategy that was not chosen.
    """
    theirs = {"ddp": OF_DDP, "fsdp": OF_FSDP}.get(str(strategy), {})
    for name, default in (OF_DDP | OF_FSDP).items():
        if name not in theirs and options.get(name, default) != default:
            owner = "ddp" if name in OF_DDP else "fsdp"
            raise ValueError(f"trainer.{name} is an option of trainer.strategy={owner}, and this run has {strategy}")
    mine = theirs | {name: value for name, value in options.items() if name in theirs}
    if strategy == "ddp":
        from trainkit.launch.process.ddp import DataParallel

        return {"strategy": DataParallel(**mine), "precision": precision}
    if strategy == "fsdp":
        return sharded(precision, mine)
    return {"strategy": strategy, "precision": precision}


def sharded(precision: str | None, options: dict[str, Any]) -> dict[str, Any]:
    if not torch.distributed.is_available():
        raise ValueError("trainer=fsdp needs a torch that was built with torch.distributed. Try trainer=gpu")
    from lightning.pytorch.plugins import DoublePrecision

    from trainkit.launch.process.fsdp import FullySharded

    # Lightning lets the strategies that it is based on have every precision but double.
    known = {"plugins": [DoublePrecision()]} if precision == "64-true" else {"precision": precision}
    return {"strategy": FullySharded(**options), **known}


def check_devices(accelerator: str, devices: Any) -> None:
    """Raises ValueError where there are fewer GPUs than asked for."""
    here = torch.cuda.device_count()
    gpus = accelerator in ("gpu", "cuda") or (accelerator == "auto" and here > 0)
    if gpus and type(devices) is int and devices > here and not (here == 0 and torch.backends.mps.is_available()):
        raise ValueError(
            f"trainer.devices={devices} on trainer.accelerator={accelerator}: there {'is' if here == 1 else 'are'} "
            f"{here} GPU{'s' if here != 1 else ''} here. Try "
            + (f"trainer.devices={here}" if here else "trainer=cpu, or trainer.accelerator=cpu")
        )
