"""compile=true|auto: the blocks of a network as kernels of its own, made while it trains."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch._functorch.config
from torch import nn

from trainkit.launch.console import log
from trainkit.launch.explain import shorten
from trainkit.launch.process.precision import device_kind
from trainkit.model.parts.recompute import blocks_of

VERSIONS = 8  # of a block, one per mode and shape of its input; torch's own limit is for all blocks together


def wanted(setting: bool | str, accelerator: str) -> bool:
    """Whether to compile; `auto`: on a CUDA GPU with Triton. On a CPU the minute it takes rarely comes back."""
    if setting == "auto":
        return device_kind(accelerator) == "cuda" and find_spec("triton") is not None
    return bool(setting)


def compile_blocks(model: nn.Module, *, strict: bool, backend: str = "inductor") -> None:
    """Compiles each block where it stands: names, hooks on blocks and state_dict stay as they are.

    Blocks of the same code share their kernels, so the time that this takes does not grow with depth; it is spent when
    a block first runs. A model without blocks is compiled as a whole. Where a block or its backward cannot be compiled,
    all of them go on without from there and the reason is logged; strict: the error is raised.
    """
    parts = blocks_of(model) or [model]
    versions = VERSIONS * max(1, len(parts))
    torch._dynamo.config.recompile_limit = versions
    torch._dynamo.config.accumulated_recompile_limit = max(256, versions)  # of one piece of code in all; 256 is torch's
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would go on uncompiled, and say so in a log only
    # The backward's kernels are made with the forward's: what cannot be compiled then shows while there is a way back.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    group: list[nn.Module] = []
    for part in parts:
        part.compile(backend=backend)
        compiled = part._compiled_call_impl
        assert compiled is not None
        part._compiled_call_impl = compiled if strict else Guarded(compiled, part, group)  # type: ignore[assignment]
        group.append(part)


class Guarded:
    """A compiled call that goes on without where compiling fails, and then for all parts of the group."""

    def __init__(self, compiled: Callable[..., Any], part: nn.Module, group: list[nn.Module]):
        self.compiled, self.part, self.group = compiled, part, group

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            return self.compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # before the block has computed anything
            reason = " ".join(str(error).split("\n")[:2])  # the second line says what the first one names
            log.warning("compile=auto: going on without, as %s", shorten(reason, 200))
            for part in self.group:
                part._compiled_call_impl = None
            return self.part(*args, **kwargs)
