"""What the framework costs: a run with every default against a plain PyTorch loop over the same model and data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from trainkit.bench.bare import Bare
from trainkit.bench.beside import Beside, prepared
from trainkit.bench.record import CLOCKS, Result, about, options, positive, show

# The default model, and one whose step is mostly matrix product; what a step may cost against the plain loop.
SIZES = {"default gpt": ([], 1.05), "6 layers x 384": (["model.depth=6", "model.width=384", "model.heads=6"], 1.02)}


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench overhead", description=__doc__)
    parser.add_argument("--depth", type=int, help="layers; with --width, in place of the two sizes that have a limit")
    parser.add_argument("--width", type=int, help="channels, a multiple of 64")
    parser.add_argument("--interval", type=int, default=10, help="steps between two turns, a multiple of the log's 10")
    parser.add_argument("--accelerator", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("words", nargs="*", help="further words of the run's command line, as logger=none")
    options(parser, rounds=20)
    given = parser.parse_args(args)
    positive(parser, given, "rounds", "threads", "interval")
    if (given.depth is None) != (given.width is None) or (given.width is not None and given.width % 64):
        parser.error("--depth and --width are given together, --width as a multiple of 64")

    machine = about(given)
    sizes = SIZES
    if given.depth is not None and given.width is not None:
        shape = [f"model.depth={given.depth}", f"model.width={given.width}", f"model.heads={given.width // 64}"]
        sizes = {f"{given.depth} layers x {given.width}": (shape, None)}
    results = [compare(name, words, limit, given) for name, (words, limit) in sizes.items()]
    said = f"median of {given.rounds} pairs of {given.interval} steps each, {given.clock} time"
    show(machine, results, given, f"a: run.py with every default but float32; b: plain loop; ms of a step, {said}")


def compare(name: str, words: Sequence[str], limit: float | None, given: argparse.Namespace) -> Result:
    steps = Beside.steps(given.interval, given.rounds)
    chosen = [*words, f"trainer={given.accelerator}", "trainer.precision=32-true", f"trainer.threads={given.threads}"]
    with prepared([*chosen, f"trainer.max_steps={steps}", *given.words]) as run:
        bare = Bare(run.cfg, run.data, steps=steps, device=run.trainer.strategy.root_device)
        beside = Beside(bare, interval=given.interval, rounds=given.rounds, clock=CLOCKS[given.clock])
        run.fit(beside)
    result = {"name": f"run / plain loop, {name}"} | beside.ratio()
    return result | ({} if limit is None else {"at_most": limit})
