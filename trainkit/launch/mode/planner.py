"""A configuration measured without running it: what a plan is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf, open_dict

from trainkit.data.tokenizer import Subwords
from trainkit.launch.explain import UserError
from trainkit.launch.job import build_task, make, mistakes
from trainkit.launch.process import machine
from trainkit.launch.process.precision import choose_precision
from trainkit.measure.blocks import blocks
from trainkit.model.parts.token_loss import pieces_as_on
from trainkit.optimizer.partition import roles
from trainkit.plan.devices import HALF_PEAK, MEMORY_GB, NO_BFLOAT16, listed
from trainkit.plan.memory import GIB, Layout, Memory, Numbers, memory
from trainkit.plan.optimizer import OptimizerMemory, optimizer_memory
from trainkit.plan.step import Pass, measure_pass
from trainkit.task.base import Task
from trainkit.task.classify import Classification
from trainkit.task.continual import ContinualClassification
from trainkit.task.lm import LanguageModeling

DTYPES = {"64": torch.float64, "32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


@dataclass(frozen=True)
class Device:
    """name; bytes: its memory; peak: FLOP/s at half precision, None where that is not known; kind: cpu or cuda."""

    name: str
    bytes: int
    peak: float | None
    kind: str = "cuda"


@dataclass
class Planner:
    """A configuration and what was measured of it; `at` answers what other settings of it would take."""

    cfg: DictConfig
    device: Device
    layout: Layout
    micro_batch: int
    numbers: Numbers
    roles: dict[str, int]
    shapes: dict[str, list[tuple[int, ...]]]  # of the trained parameters, by role
    samples: int  # tokens, or images, of a micro-batch
    flops: int  # of a token or an image
    unit: str
    assumed: str

    @property
    def memory(self) -> Memory:
        return memory(self.numbers, self.layout)

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None where the data decide over them."""
        given = self.cfg.trainer.get("max_steps", -1)
        return given if given > 0 else None

    @property
    def shardable(self) -> bool:
        """Whether trainer=fsdp would take the optimizer and the task."""
        optimizer = get_object(self.cfg.optimizer._target_)
        return not getattr(optimizer, "whole", False) and self.cfg.choices.task != "continual"

    def sharded(self, devices: int) -> Layout:
        """The layout of trainer=fsdp over so many devices, at the same micro-batch."""
        cfg = self.cfg.copy()
        with open_dict(cfg):
            cfg.trainer = {**cfg.trainer, "strategy": "fsdp", "devices": devices, "num_nodes": 1}
        return layout_of(cfg, self.device)

    def measured(self, micro_batch: int, precision: str | None = None) -> Numbers:
        """The same at another micro-batch or precision."""
        cfg = self.cfg.copy()
        if precision:
            cfg.trainer.precision = precision
        return _numbers(cfg, self.device, micro_batch, self.numbers.optimizer if precision is None else None)


def prepare(cfg: DictConfig) -> Planner:
    """Measures the model, the pass and the optimizer that the configuration describes."""
    with mistakes():
        device = device_of(cfg)
        cfg.trainer.precision = precision_of(cfg, device)
        assumed = facts(cfg)
        layout = layout_of(cfg, device)
        micro = max(1, cfg.data.batch_size // (layout.devices * layout.accumulate))
        numbers = _numbers(cfg, device, micro)
        task = _build(cfg)
        length, unit = (cfg.data.context, "token") if isinstance(task, LanguageModeling) else (1, "image")
        counts = getattr(task.model, "flops_per_token", None)
        flops = counts(length) if counts is not None else numbers.step.flops // (micro * length)
    found = roles(task.model)
    by_role = {role: sum(p.numel() for p in tensors) for role, tensors in found.items()}
    shapes = {role: [tuple(p.shape) for p in tensors] for role, tensors in found.items()}
    return Planner(cfg, device, layout, micro, numbers, by_role, shapes, micro * length, flops, unit, assumed)


def _build(cfg: DictConfig) -> Task:
    """The task; its weights have shapes and no memory."""
    with torch.device("meta"):
        return build_task(cfg)


def _numbers(cfg: DictConfig, device: Device, micro_batch: int, known: OptimizerMemory | None = None) -> Numbers:
    precision = precision_of(cfg, device)
    dtype = DTYPES[precision.partition("-")[0]] if precision.endswith("true") else torch.float32
    mixed = DTYPES[precision.partition("-")[0]] if precision.endswith("mixed") else None
    task = _build(cfg)
    for p in task.model.parameters():
        p.data = p.data.to(dtype)
    found = roles(task.model)
    trained = [p for tensors in found.values() for p in tensors]
    inside = {p for block in blocks(task.model).values() for p in block.parameters()}
    buffers = sum(b.numel() * b.element_size() for b in task.model.buffers())
    every = list(task.model.parameters())
    return Numbers(
        weights=sum(p.numel() * p.element_size() for p in every),
        buffers=buffers,
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=known or optimizer_memory(found, task.optimizer_factory),
        shapes=[tuple(p.shape) for p in every],
        block=max((sum(p.numel() for p in b.parameters()) for b in blocks(task.model).values()), default=0),
        outside=sum(p.numel() for p in every if p not in inside),
        step=_pass(cfg, device, task, micro_batch, dtype, mixed),
    )


def _pass(
    cfg: DictConfig, device: Device, task: Task, micro_batch: int, dtype: torch.dtype, mixed: torch.dtype | None
) -> Pass:
    batch = _batch(cfg, task, micro_batch, dtype)
    with pieces_as_on(device.kind):  # the pass is imitated on the CPU
        return measure_pass(task.model, task.loss, batch, dtype=dtype, autocast=mixed)


def _batch(cfg: DictConfig, task: Task, size: int, dtype: torch.dtype) -> Callable[[], Any]:
    """What makes a batch of this task, of zeros."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    if isinstance(task, LanguageModeling):
        return lambda: (numbers(size, cfg.data.context), numbers(size, cfg.data.context))
    if isinstance(task, ContinualClassification):
        from trainkit.learner.learner import Batch

        image = (size, *cfg.data.image)
        return lambda: Batch(
            torch.zeros(image, dtype=dtype), numbers(size), numbers(size), torch.zeros(image, dtype=torch.uint8)
        )
    if isinstance(task, Classification):
        return lambda: (torch.zeros((size, *cfg.data.image), dtype=dtype), numbers(size))
    raise UserError(f"mode=plan knows the batches of task=lm, classify and continual, not of {type(task).__name__}")


# --- what the configuration leaves open ------------------------------------------------------------------------------


def facts(cfg: DictConfig) -> str:
    """Fills in what only reading the data would tell, and says what was taken for it."""
    data = cfg.data
    if "vocab" in data:
        if data.get("bytes_per_token", 1.0) is None:
            data.bytes_per_token = 1.0  # divides bits, not bytes
        if data.vocab is not None:
            return f"a vocabulary of {data.vocab:,}, as data.vocab says"
        kind = data.get("tokenizer", "byte")
        if kind == "byte" and "tokenizer" in data:
            data.vocab = 256
            return "a vocabulary of 256, the bytes (data.vocab=32000 plans for another one)"
        if kind == "bpe":
            data.vocab = data.tokenizer_vocab
            return f"a vocabulary of {data.vocab:,}, as data.tokenizer_vocab says; little text may give fewer"
        if kind == "file" and data.get("tokenizer_file"):
            data.vocab = Subwords(Path(data.tokenizer_file).expanduser()).vocab
            return f"a vocabulary of {data.vocab:,}, that of {data.tokenizer_file}"
        raise UserError("mode=plan reads no data, and these tell their vocabulary only then: add data.vocab=32000")
    if "image" in data and "classes" in data:
        if data.image is None or data.classes is None:
            if "Digit" not in data._target_:
                raise UserError(
                    "mode=plan reads no data, and these tell the size of their images only then",
                    "add data.image=[3,32,32] data.classes=10",
                )
            with mistakes():
                source = make(cfg, "data")
                source.prepare_data()
            for name, value in source.facts().items():
                OmegaConf.update(cfg, f"data.{name}", value)
        return f"images of {' x '.join(map(str, data.image or ()))} in {data.classes} classes"
    raise UserError(f"mode=plan knows data that are text or images, not {data._target_}")


def device_of(cfg: DictConfig) -> Device:
    """plan.device, else this machine's CPU under trainer.accelerator=cpu, else its GPU, else an H100."""
    name, room = cfg.plan.device, cfg.plan.memory_gib
    if name is None and cfg.trainer.get("accelerator") == "cpu":
        ranks = machine.local_ranks(cfg.trainer.get("devices", 1))
        return Device("this machine's CPU", round(room * GIB) if room else machine.memory() // ranks, None, "cpu")
    found = 0
    if name is None and torch.cuda.is_available():
        name, found = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    name = name or "H100"
    found = found or round((listed(name, MEMORY_GB) or 0) * 1e9)
    if not (room or found):
        raise UserError(f"the memory of {name} is not listed: add plan.memory_gib=80")
    return Device(name, round(room * GIB) if room else found, listed(name, HALF_PEAK))


def precision_of(cfg: DictConfig, device: Device) -> str:
    """trainer.precision; of `auto` what the device is fast at."""
    precision = str(cfg.trainer.get("precision", "32-true"))
    if precision == "auto":
        if device.kind == "cpu":
            return choose_precision("cpu")[0]
        return "32-true" if any(old in device.name for old in NO_BFLOAT16) else "bf16-mixed"
    if precision not in (*(f"{kind}-true" for kind in DTYPES), "bf16-mixed", "16-mixed"):
        raise UserError(f"mode=plan knows no trainer.precision={precision}: try bf16-mixed or 32-true")
    return precision


def layout_of(cfg: DictConfig, device: Device) -> Layout:
    trainer = cfg.trainer
    count = devices(trainer) * trainer.get("num_nodes", 1)
    kind = strategy(trainer)
    precision = precision_of(cfg, device)
    plain = 2 if precision in ("bf16-true", "16-true") else 8 if precision == "64-true" else 4
    sent = 2 if trainer.get("gradient_compression", "none") == "bf16" else plain
    return Layout(
        kind=kind if count > 1 else "single",
        devices=count,
        accumulate=trainer.get("accumulate_grad_batches", 1),
        recompute=bool(trainer.get("activation_checkpointing", False)),
        bucket_view=bool(trainer.get("gradient_as_bucket_view", False)),
        reshard=bool(trainer.get("reshard_after_forward", True)),
        block_weight=2 if precision.endswith("mixed") else plain,
        other_weight=plain,
        gradient=max(4, plain) if kind == "fsdp" else sent,
    )


def strategy(trainer: DictConfig) -> str:
    named = str(trainer.get("strategy", "auto"))
    return "fsdp" if "fsdp" in named or "FullySharded" in named else "ddp"


def devices(trainer: DictConfig) -> int:
    """Devices of one machine; of "auto" and -1 those that this one has."""
    given = trainer.get("devices", 1)
    if given in ("auto", -1, "-1"):
        return max(1, torch.cuda.device_count())
    return machine.local_ranks(given)
