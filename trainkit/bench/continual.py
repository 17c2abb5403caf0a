"""Samples per second of online ER-ACE on a ResNet-18 with every strategy, against continual=none at equal forwards."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from trainkit.bench.timing import Step, hardware, interleaved
from trainkit.launch.compose import compose
from trainkit.launch.job import build_task
from trainkit.launch.sources import Folders
from trainkit.launch.versions import versions
from trainkit.learner.learner import Batch, Stream
from trainkit.norm_layer.stateful import advance
from trainkit.optimizer.partition import by_role, split

REFERENCE = "none"
TASKS, CLASSES = 5, 10  # Split CIFAR-10
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench continual", description=__doc__)
    parser.add_argument("--width", type=int, default=20, help="channels of the first stage; 64 for the full network")
    parser.add_argument("--batch", type=int, default=10, help="images per step; as many are replayed beside them")
    parser.add_argument("--image", type=int, default=32, help="pixels in both directions")
    parser.add_argument("--buffer", type=int, default=500, help="images in the buffer")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each strategy")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each operation")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of all threads, for a busy machine")
    parser.add_argument("--strategies", nargs="+", metavar="NAME", help="only these of conf/continual")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    given = parser.parse_args(args)
    menu = Folders().options("continual")
    unknown = sorted(set(given.strategies or []) - set(menu))
    if unknown:
        parser.error(f"conf/continual has no {', '.join(unknown)}; it has {', '.join(menu)}")
    if min(given.width, given.batch, given.image, given.buffer, given.rounds, given.threads) < 1:
        parser.error("--width, --batch, --image, --buffer, --rounds and --threads are at least 1")

    torch.set_num_threads(given.threads)
    about = {"hardware": hardware(), "versions": versions()}
    rows = compare(given.strategies or [name for name in menu if name != REFERENCE], given)
    if given.json:
        print(json.dumps(about | {"results": results(rows, given)}))
        return
    print("\n".join(f"{key}: {value}" for part in about.values() for key, value in part.items()))
    print(f"ResNet-18 of width {given.width}, images (3, {given.image}, {given.image}), second task of {TASKS}")
    print(f"a step: one forward of {given.batch} new images and {given.batch} replayed ones, backward, SGD")
    print(f"median of {given.rounds} steps, {given.clock} time, each interleaved with continual={REFERENCE}")
    print(table(rows, given))


def compare(names: Sequence[str], given: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """By strategy: seconds of a step, its own and those of the reference interleaved with it."""
    rows = {}
    for name in names:
        if sys.stderr.isatty():
            print(f"\r{name:20}", end="\r", file=sys.stderr, flush=True)
        steps = {"a": build(name, given), "b": build(REFERENCE, given)}
        for step in steps.values():
            for _ in range(2):  # takes the memory that is used again
                step()
        seconds = interleaved(steps, given.rounds, clock=CLOCKS[given.clock])
        rows[name] = seconds["a"], seconds["b"]
    return rows


def build(name: str, given: argparse.Namespace) -> Step:
    """A training step in the second task, with a full buffer: what a run does, without its loading and logging."""
    image = [3, given.image, given.image]
    words = [f"data.image={image}", f"data.classes={CLASSES}", f"data.tasks={TASKS}", f"data.batch_size={given.batch}"]
    words += ["model=resnet18", f"model.width={given.width}", "data=split_digits", f"continual={name}"]
    words += ["learner=er_ace", "learner.forward=joint", f"learner.buffer_size={given.buffer}"]
    task = build_task(compose(words))
    model, strategy, learner = task.model.train(), task.strategy, task.learner
    optimizer = build_optimizer(task)

    own = CLASSES // TASKS
    learner.begin(stream(own), strategy)  # type: ignore[attr-defined]
    for number, count in enumerate((given.buffer, given.batch)):
        strategy.begin_task(model, number)
        learner.begin_task(model, number)  # type: ignore[attr-defined]
        raw = torch.randint(256, (count, *image), dtype=torch.uint8)
        batch = Batch(scaled(raw), number * own + torch.arange(count) % own, torch.full((count,), number), raw)
        if number == 0:
            learner.buffer.add(raw, batch.labels, batch.task_ids)  # type: ignore[attr-defined]
            strategy.end_task(model, number)

    def step() -> None:
        optimizer.zero_grad()
        loss, _ = learner(model, batch, task.loss)
        (loss + strategy.penalty(model)).backward()
        optimizer.step()

    return step


def build_optimizer(task: Any) -> torch.optim.Optimizer:
    """The optimizer of a run, with what follows its steps."""
    factory, words = split(task.optimizer_factory)
    optimizer = by_role(task.model, factory, **words)
    if hasattr(task.projection, "prepare"):
        task.projection.prepare(optimizer)
    task.projection(task.model)
    optimizer.register_step_post_hook(lambda *_: task.projection(task.model))
    optimizer.register_step_post_hook(lambda *_: advance(task.model))
    return optimizer


def stream(own: int) -> Stream:
    """`own` classes in each task, images as they are."""
    classes_of = [list(range(own * task, own * task + own)) for task in range(TASKS)]
    return Stream(tasks=TASKS, classes=CLASSES, classes_of=classes_of, transform=lambda raw, _: scaled(raw))


def scaled(raw: torch.Tensor) -> torch.Tensor:
    return raw.float() / 128 - 1


def table(rows: dict[str, tuple[float, float]], given: argparse.Namespace) -> str:
    lines = [f"\n{'strategy':20}{'samples/s':>11}{REFERENCE:>11}{'time / ' + REFERENCE:>13}"]
    for name, (a, b) in rows.items():
        lines.append(f"{name:20}{given.batch / a:11.1f}{given.batch / b:11.1f}{a / b:13.2f}")
    return "\n".join(lines)


def results(rows: dict[str, tuple[float, float]], given: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per strategy; a is the strategy, b the reference, and samples are the stream's, without replayed."""
    return [
        {"name": f"{name} / {REFERENCE}, width {given.width}", "ratio": a / b, "seconds_a": a, "seconds_b": b}
        | {"samples_per_second_a": given.batch / a, "samples_per_second_b": given.batch / b}
        for name, (a, b) in rows.items()
    ]
