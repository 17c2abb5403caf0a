"""Speed and memory of training: a run of trainkit step by step beside a plain nanoGPT-style loop, and its MFU."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainkit.bench.bare import batches
from trainkit.bench.beside import Beside, Prepared, prepared
from trainkit.bench.nanogpt import Loop, NanoGPT
from trainkit.bench.peak import matmul_peak
from trainkit.bench.profile import Shares
from trainkit.bench.record import CLOCKS, Result, about, options, positive, show
from trainkit.bench.timing import Peak, held_bytes

LEAST = {"auto": 2.3, "32-true": 1.03}  # times the tokens/s of the plain loop in float32, at 6 x 384
MEMORY = 0.8  # of the plain loop's, with a vocabulary of LARGE or more at precision=auto
LARGE = 50_000
WARMUP = 3  # steps
PRODUCTS = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench train", description=__doc__)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=384, help="channels, a multiple of 64, which is a head's")
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--context", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--vocab", type=int, default=256, help="at least 256; beyond that no text has the tokens")
    parser.add_argument("--precision", nargs="+", default=list(LEAST), help="trainer.precision, one run for each")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--reference", default="float32", choices=("float32", "bfloat16"), help="the plain loop's")
    parser.add_argument("--compile", action="store_true", help="compiles the plain loop's model")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    parser.add_argument("words", nargs="*", help="further words of the run's command line, as compile=true")
    options(parser, rounds=20)
    given = parser.parse_args(args)
    positive(parser, given, "depth", "width", "batch", "context", "rounds", "threads")
    if given.width % 64 or given.vocab < 256:
        parser.error("--width is a multiple of 64, and --vocab at least 256, as the text's tokens are bytes")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")

    machine = about(given)
    results = [entry for precision in given.precision for entry in compare(precision, given)]
    size = f"{given.depth} layers x {given.width}, {given.batch} x {given.context} tokens, vocabulary {given.vocab:,}"
    plain = f"plain loop in {given.reference}, {'compiled' if given.compile else 'eager'}"
    show(machine, results, given, size, f"a: {plain}; b: run.py with every default; {given.clock} time")


def compare(precision: str, given: argparse.Namespace) -> list[Result]:
    """Tokens per second, peak memory and, where asked for, the profile of a run at this precision."""
    steps = Beside.steps(1, given.rounds, WARMUP, looks=1 + given.profile)
    with prepared([*words(given), f"trainer.precision={precision}", f"trainer.max_steps={steps}", *given.words]) as run:
        loop = reference(run, given, total=steps)
        memory = Footprint(lambda: (run.task.model, run.trainer.optimizers[0]), given.device)
        shares = Shares(given.device)
        looks = [memory, shares] if given.profile else [memory]
        clock = CLOCKS[given.clock]
        beside = Beside(loop, interval=1, rounds=given.rounds, warmup=WARMUP, clock=clock, looks=looks)
        run.fit(beside)
        found = [speed(precision, beside, run, given), memory_of(precision, memory, loop, given)]
        if given.profile:
            plain = Shares(given.device)
            with plain:
                loop()
            found.append({"name": f"shares of a step, trainkit {precision}"} | rounded(shares.shares))
            found.append({"name": f"shares of a step, plain loop in {given.reference}"} | rounded(plain.shares))
    return found


class Footprint(AbstractContextManager[None]):
    """A context around a step, after which `bytes` is the most memory during it, weights and optimizer included.

    of: gives the model and its optimizer. What they hold is told apart from what else the process does.
    """

    def __init__(self, of: Callable[[], tuple[nn.Module, Optimizer]], device: str):
        self.of, self.peak, self.held = of, Peak(device), 0

    def __enter__(self) -> None:
        self.held = held_bytes(*self.of())
        self.peak.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.peak.__exit__(*error)

    @property
    def bytes(self) -> int:
        return self.held + self.peak.bytes


def words(given: argparse.Namespace) -> list[str]:
    shape = {"depth": given.depth, "width": given.width, "heads": given.width // 64}
    shape |= {"context": given.context, "vocab": given.vocab}
    run = {"data.batch_size": given.batch, "trainer.threads": given.threads, "trainer": TRAINERS[given.device]}
    return [f"model.{key}={value}" for key, value in shape.items()] + [f"{key}={value}" for key, value in run.items()]


TRAINERS = {"cpu": "cpu", "cuda": "gpu"}


def reference(run: Prepared, given: argparse.Namespace, *, total: int) -> Loop:
    model = NanoGPT(
        given.vocab, depth=given.depth, width=given.width, heads=given.width // 64, context=given.context
    ).to(given.device)
    autocast = torch.bfloat16 if given.reference == "bfloat16" else None
    warmup = min(100, total // 2)
    return Loop(model, batches(run.data), warmup=warmup, total=total, autocast=autocast, compile=given.compile)


def speed(precision: str, beside: Beside, run: Prepared, given: argparse.Namespace) -> Result:
    """Of the plain loop to the run: the ratio of times is that of tokens per second."""
    own = beside.ratio()
    tokens = given.batch * given.context
    seconds = {"a": own["seconds_b"], "b": own["seconds_a"]}
    result: Result = {"name": f"speed, plain loop / trainkit {precision}", "ratio": 1 / own["ratio"]}
    if precision in LEAST and given.reference == "float32" and (given.depth, given.width) == (6, 384):
        result["at_least"] = LEAST[precision]
    result |= {f"seconds_{side}": value for side, value in seconds.items()}
    result |= {f"tokens_per_second_{side}": tokens / value for side, value in seconds.items()}
    result |= {f"{mark}_a": value for mark, value in percentiles(beside.others).items()}
    result |= {f"{mark}_b": value for mark, value in percentiles(beside.seconds).items()}
    dtype = PRODUCTS.get(str(run.trainer.precision), torch.float32)
    model = run.task.model.to(given.device)
    peak = matmul_peak(model, tokens, dtype, clock=time.perf_counter if given.device == "cuda" else CLOCKS[given.clock])
    flops = model.flops_per_token(given.context) * tokens  # type: ignore[operator]
    result |= {"precision": str(run.trainer.precision), "peak_flops": peak}
    return result | {f"mfu_{side}": flops / value / peak for side, value in seconds.items()}


def memory_of(precision: str, memory: Footprint, loop: Loop, given: argparse.Namespace) -> Result:
    """Of the run to the plain loop."""
    plain = Footprint(lambda: (loop.model, loop.optimizer), given.device)
    with plain:
        loop()
    ratio = memory.bytes / plain.bytes
    result: Result = {"name": f"peak memory, trainkit {precision} / plain loop", "ratio": ratio}
    if precision == "auto" and given.vocab >= LARGE:
        result["at_most"] = MEMORY
    return result | {"mib_a": memory.bytes / 2**20, "mib_b": plain.bytes / 2**20}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p10, p50 and p90, seconds."""
    marks = {"p10": 0.1, "p50": 0.5, "p90": 0.9}
    values = torch.tensor(seconds, dtype=torch.float64)
    return {name: float(torch.quantile(values, mark)) for name, mark in marks.items()}


def rounded(shares: dict[str, float]) -> dict[str, Any]:
    return {name: round(share, 3) for name, share in shares.items()}
