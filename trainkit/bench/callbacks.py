"""What measuring costs: steps of a run with the default callbacks, and with all diagnostics, against one with none."""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer

from trainkit.bench.beside import quiet
from trainkit.bench.record import CLOCKS
from trainkit.bench.timing import hardware
from trainkit.launch.compose import compose
from trainkit.launch.console import to_terminal
from trainkit.launch.job import build_data, build_task, make
from trainkit.launch.loggers import JsonlLogger
from trainkit.launch.versions import versions
from trainkit.task.base import Task

NEVER = 10**9  # steps
REFERENCE = "none"
LIMITS = {"default": 0.01, "default, every step": 0.03}  # what may be added to the step
OUTSIDE_OF_STEPS = ("figures", "checkpoint")  # what only acts when a run ends or is validated


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench callbacks", description=__doc__)
    parser.add_argument("--scale", type=float, help="GPT-2 124M, its width and context at this share; else model=gpt")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step")
    parser.add_argument("--cadence", type=int, default=10, help="steps between two logs, and in one timed interval")
    parser.add_argument("--rounds", type=int, default=30, help="timed intervals of each run")
    parser.add_argument("--looks", type=int, default=5, help="timed looks of callbacks=diagnostics; 0: none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each operation")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of all threads, for a busy machine")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    given = parser.parse_args(args)
    if min(given.batch, given.cadence, given.rounds, given.threads) < 1 or given.looks < 0:
        parser.error("--batch, --cadence, --rounds and --threads are at least 1, --looks at least 0")
    if given.scale is not None and not 0 < given.scale <= 1:
        parser.error("--scale lies above 0 and at most at 1")

    to_terminal()
    about = {"hardware": hardware() | {"threads": given.threads}, "versions": versions()}
    found = compare(given)
    if given.json:
        print(json.dumps(about | {"parameters": found["parameters"], "results": results(found, given)}))
        return
    print("\n".join(f"{key}: {value}" for part in about.values() for key, value in part.items()))
    print(f"{' '.join(words(given)[:5])}: {found['parameters']:,} parameters, steps of {given.batch} sequences")
    print(
        f"median over {given.rounds} intervals of {given.cadence} steps, {given.clock} time, each beside one with none"
    )
    print(table(found, given))


def words(given: argparse.Namespace) -> list[str]:
    """The model as the command line would choose it."""
    if given.scale is None:
        return ["model=gpt"]
    heads = max(1, round(12 * given.scale))
    return ["model=gpt_124m", f"model.width={64 * heads}", f"model.heads={heads}", f"model.context={_context(given)}"]


def _context(given: argparse.Namespace) -> int:
    return max(16, round(1024 * given.scale))


class Paced:
    """A run in a thread of its own that takes steps when it is told to, so that several runs can take turns."""

    def __init__(self, name: str, chosen: Sequence[str], folder: Path, given: argparse.Namespace):
        cfg = compose(
            [
                *words(given),
                *chosen,
                f"data.batch_size={given.batch}",
                f"trainer={given.accelerator}",
                "trainer.max_steps=1000000",
                f"trainer.val_check_interval={NEVER}",
                f"trainer.threads={given.threads}",
            ]
        )
        data: LightningDataModule = build_data(cfg)
        self.task: Task = build_task(cfg)
        listening = {name: c for name, c in (make(cfg, "callbacks") or {}).items() if name not in OUTSIDE_OF_STEPS}
        self._gate = Gate()
        self.spent = 0.0  # seconds in the callbacks' hooks, the gradient's treatment, and handing numbers to the log
        self._clock = CLOCKS[given.clock]
        for callback in listening.values():
            for hook in (name for name in dir(Callback) if name.startswith("on_")):
                if getattr(type(callback), hook) is not getattr(Callback, hook):
                    setattr(callback, hook, self._timed(getattr(callback, hook)))
        self.task.flush = self._timed(self.task.flush)  # type: ignore[method-assign]
        # Whoever looks at the gradients first pays for the treatment, too: the guard, and where there is none, it.
        self.task.treat_gradient = self._timed(self.task.treat_gradient)  # type: ignore[method-assign]
        folder = folder / name
        folder.mkdir()
        trainer: Trainer = make(cfg, "trainer")(callbacks=[self._gate, *listening.values()], run_dir=folder)
        trainer.loggers = [JsonlLogger(folder)]
        self._thread = threading.Thread(target=self._run, args=(trainer, data), daemon=True)
        self._error: BaseException | None = None

    def start(self) -> None:
        """Up to the first step."""
        self._thread.start()
        self._wait()

    def advance(self, steps: int) -> None:
        self._gate.left = steps
        self._gate.go.release()
        self._wait()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._gate.closed = True
            self._gate.go.release()
            self._thread.join()

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **keywords: Any) -> Any:
            start = self._clock()
            try:
                return method(*args, **keywords)
            finally:
                self.spent += self._clock() - start

        return timed

    def _wait(self) -> None:
        self._gate.here.acquire()
        if self._error is not None:
            raise RuntimeError(f"a run failed: {self._error}") from self._error

    def _run(self, trainer: Trainer, data: LightningDataModule) -> None:
        try:
            trainer.fit(self.task, datamodule=data)
        except Closed:
            return
        except BaseException as error:
            self._error = error
            self._gate.here.release()


class Closed(Exception):
    """Ends a run that has taken its last step."""


class Gate(Callback):
    """Holds a run before each step that it has not been told to take; the first callback, so all others are timed."""

    def __init__(self) -> None:
        self.left = 0
        self.closed = False
        self.go, self.here = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Task, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        if self.left == 0:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize(trainer.strategy.root_device)
            self.here.release()
            self.go.acquire()
            if self.closed:
                raise Closed
        self.left -= 1


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """By run, in the order of the rounds: seconds of each interval (a look: of a step), and of those inside callbacks.

    And the model's size.
    """
    runs = {
        REFERENCE: ["callbacks=none", f"trainer.log_every_n_steps={given.cadence}"],
        "default": [f"trainer.log_every_n_steps={given.cadence}"],
        "default, every step": ["trainer.log_every_n_steps=1"],
    }
    if given.looks:
        runs["diagnostics"] = ["callbacks=diagnostics", f"trainer.log_every_n_steps={given.cadence}"]
        runs["diagnostics"] += [f"callbacks.activations.every={NEVER}"]
        runs["look"] = ["callbacks=diagnostics", "trainer.log_every_n_steps=1", "callbacks.activations.every=1"]
    clock = CLOCKS[given.clock]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    inside: dict[str, list[float]] = {name: [] for name in runs}
    with TemporaryDirectory() as folder, quiet(Path(folder)), ExitStack() as stack:
        paced = {}
        for name, chosen in runs.items():
            paced[name] = run = Paced(name, chosen, Path(folder), given)
            run.start()
            stack.callback(run.stop)
            run.advance(2 if name == "look" else given.cadence)  # takes the memory that is used again
        for number in range(given.rounds):
            for name in _turned(list(runs), number):
                if name == "look" and number >= given.looks:
                    continue
                before, start = paced[name].spent, clock()
                paced[name].advance(1 if name == "look" else given.cadence)
                seconds[name].append(clock() - start)
                inside[name].append(paced[name].spent - before)
            if sys.stderr.isatty():
                print(f"\r{number + 1}/{given.rounds}", end="\r", file=sys.stderr, flush=True)
        parameters = sum(p.numel() for p in paced[REFERENCE].task.parameters())
    return {"seconds": seconds, "inside": inside, "parameters": parameters}


def _turned(names: list[str], number: int) -> list[str]:
    """Each round begins with another one, so that none always follows the same."""
    place = number % len(names)
    return names[place:] + names[:place]


def results(found: dict[str, Any], given: argparse.Namespace) -> list[dict[str, Any]]:
    """One entry per run: seconds of a step and of one of the reference, and the median of the rounds' own ratios.

    inside: what is spent in the hooks of the callbacks, in treating the gradient and in logging, less what the
    reference spends there, as a share of its step: without the noise of two whole steps, but also without what
    callbacks do to the caches of the rest.
    """
    seconds = found["seconds"]
    spent = {name: median(values) / given.cadence for name, values in found["inside"].items() if name != "look"}
    reference = [value / given.cadence for value in seconds[REFERENCE]]
    step = median(reference)
    entries = []
    for name in (name for name in seconds if name not in (REFERENCE, "look")):
        own = [value / given.cadence for value in seconds[name]]
        ratio = median(a / b for a, b in zip(own, reference, strict=True))
        entry = {"name": f"{name} / {REFERENCE}", "ratio": ratio, "seconds_a": median(own), "seconds_b": step}
        entry["inside"] = (spent[name] - spent[REFERENCE]) / step
        entries.append(entry | ({"limit": 1 + LIMITS[name]} if name in LIMITS else {}))
    if seconds.get("look"):
        look = median(seconds["look"]) - step
        entries.append({"name": "one look of diagnostics", "seconds": look, "steps": look / step})
    return entries


def table(found: dict[str, Any], given: argparse.Namespace) -> str:
    lines = [f"\n{'callbacks':22}{'ms/step':>10}{REFERENCE:>10}{'cost':>9}{'inside':>9}{'limit':>8}"]
    for entry in results(found, given):
        if "ratio" in entry:
            limit = f"{entry['limit'] - 1:8.0%}" if "limit" in entry else ""
            name = entry["name"].partition(" / ")[0]
            times = f"{1000 * entry['seconds_a']:10.2f}{1000 * entry['seconds_b']:10.2f}"
            lines.append(f"{name:22}{times}{entry['ratio'] - 1:+9.2%}{entry['inside']:+9.2%}{limit}")
        else:
            lines.append(f"{entry['name']}: {1000 * entry['seconds']:.0f} ms, {entry['steps']:.1f} steps")
    return "\n".join(lines)
