"""How time and memory of a training step grow with depth, width, context, vocabulary and tokens: fitted exponents."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainkit.bench.record import CLOCKS, Result, about, options, positive, show
from trainkit.bench.timing import held_bytes, interleaved, peak_bytes
from trainkit.launch.compose import compose
from trainkit.launch.job import make
from trainkit.measure.grad_norm import grad_norm, grad_norm_l1
from trainkit.measure.sites import sites
from trainkit.optimizer.partition import by_role, split

BASE = {"depth": 4, "width": 128, "context": 128, "vocab": 256, "batch": 4}
AXES = {
    "tokens": ("batch", [4, 8, 16, 32]),
    "depth": ("depth", [4, 8, 16, 32]),
    "width": ("width", [64, 128, 256, 512]),
    "context": ("context", [64, 128, 256, 512]),
    "vocab": ("vocab", [1024, 4096, 16384, 32768]),
}
LINEAR = 1.05  # the largest exponent of what is to grow in proportion


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench scaling", description=__doc__)
    parser.add_argument("--axes", nargs="+", default=[*AXES, "gradient norms"], choices=[*AXES, "gradient norms"])
    parser.add_argument("--points", type=int, default=4, help="sizes along each axis, 2 to 4")
    parser.add_argument("words", nargs="*", help="further words of a run's command line, as norm=peri")
    options(parser, rounds=5)
    given = parser.parse_args(args)
    positive(parser, given, "rounds", "threads")
    if not 2 <= given.points <= 4:
        parser.error("--points lies between 2 and 4")

    machine = about(given)
    results = [entry for axis in given.axes for entry in measure(axis, given)]
    sizes = ", ".join(f"{name} {value}" for name, value in BASE.items())
    lines = ["a: the largest size, b: the smallest; exponent: log-log fit over all of them", f"else: {sizes}"]
    show(machine, results, given, *lines, f"a step in float32, a plain loop; {given.clock} time")


def measure(axis: str, given: argparse.Namespace) -> list[Result]:
    if axis == "gradient norms":
        return [_gradient_norms(given)]
    key, values = AXES[axis]
    values = values[: given.points]
    models = {value: Trained(BASE | {key: value}, given.words) for value in values}
    seconds = _seconds({str(value): model.step for value, model in models.items()}, given)
    times = [seconds[str(value)] for value in values]
    memory = [model.peak() for model in models.values()]
    sizes = f"{values[0]} to {values[-1]}"
    fit = exponent(values, times)
    time = {"name": f"time by {axis}, {sizes}", "exponent": fit, "ratio": times[-1] / times[0]}
    time |= {"seconds_a": times[-1], "seconds_b": times[0], "sizes": values, "seconds": times}
    if axis in ("tokens", "depth"):
        time |= {"limit_of_exponent": LINEAR, "within": fit <= LINEAR}
    room = {"name": f"memory by {axis}, {sizes}", "exponent": exponent(values, memory), "ratio": memory[-1] / memory[0]}
    return [time, room | {"sizes": values, "bytes": memory}]


def _gradient_norms(given: argparse.Namespace) -> Result:
    """What the callback grad_norm measures, over networks of 4 to 32 layers."""
    depths = AXES["depth"][1][: given.points]
    looks: dict[str, Callable[[], Any]] = {}
    counts = []
    for depth in depths:
        model = Trained(BASE | {"depth": depth, "width": 256}, given.words)
        model.gradients()
        counts.append(sum(p.numel() for p in model.model.parameters()))
        looks[str(depth)] = _look(sites(model.model))
    seconds = _seconds(looks, given, times=10)
    times = [seconds[str(depth)] for depth in depths]
    fit = exponent(counts, times)
    result: Result = {"name": f"time of gradient norms by parameters, {counts[0]:,} to {counts[-1]:,}", "exponent": fit}
    result |= {"ratio": times[-1] / times[0], "seconds_a": times[-1], "seconds_b": times[0]}
    return result | {"sizes": counts, "seconds": times, "limit_of_exponent": LINEAR, "within": fit <= LINEAR}


def _look(found: dict[str, list[nn.Parameter]]) -> Callable[[], Any]:
    everything = [p for members in found.values() for p in members]

    def look() -> None:
        grad_norm(found)
        grad_norm_l1(everything)

    return look


def _seconds(steps: dict[str, Callable[[], Any]], given: argparse.Namespace, times: int = 1) -> dict[str, float]:
    repeated = {name: _repeated(step, times) for name, step in steps.items()}
    interleaved(repeated, 2)  # takes the memory that is used again
    found = interleaved(repeated, given.rounds, clock=CLOCKS[given.clock])
    return {name: seconds / times for name, seconds in found.items()}


def _repeated(step: Callable[[], Any], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            step()

    return repeated


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log(value) over log(size) by least squares: 1 where values grow in proportion."""
    xs, ys = [log(size) for size in sizes], [log(value) for value in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


class Trained:
    """A GPT of a size with its optimizer and one batch of random tokens."""

    def __init__(self, size: dict[str, int], words: Sequence[str]):
        torch.manual_seed(0)
        shape = {key: value for key, value in size.items() if key != "batch"} | {"heads": max(1, size["width"] // 64)}
        cfg = compose([*(f"model.{key}={value}" for key, value in shape.items()), *words])
        self.model: nn.Module = make(cfg, "model")
        factory, options = split(make(cfg, "optimizer"))
        self.optimizer: Optimizer = by_role(self.model, factory, **options)
        tokens = torch.randint(size["vocab"], (size["batch"], size["context"] + 1))
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def gradients(self) -> None:
        logits: Tensor = self.model(self.inputs)
        nn.functional.cross_entropy(logits.flatten(0, 1), self.targets.flatten()).backward()

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak(self) -> int:
        """The most bytes during a step, weights and optimizer state included."""
        return held_bytes(self.model, self.optimizer) + peak_bytes(self.step)
