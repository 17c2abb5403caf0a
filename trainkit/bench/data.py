"""What the loader delivers without a model: text and images, against what training on a fast GPU would take."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from lightning.pytorch import LightningDataModule

from trainkit.bench.record import Result, about, options, positive, show
from trainkit.data.loader import Share, TrainLoader
from trainkit.data.pixels import Pixels, Split
from trainkit.launch.compose import compose
from trainkit.launch.job import build_data, make

H100, MFU = 989.4e12, 0.5  # FLOP/s of one at half precision (callbacks/throughput.py), and the share training has of it
LEAST = 10.0  # times the training's rate


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench data", description=__doc__)
    parser.add_argument("--batch", type=int, default=32, help="sequences per step of text")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--images", type=int, default=128, help="images per step, of 3 x 32 x 32")
    parser.add_argument("--batches", type=int, default=50, help="in one timed turn")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--tokens-per-second", type=float, help="of the training; else 124M at 50 %% MFU of an H100")
    parser.add_argument("words", nargs="*", help="further words of the run's command line, as data=stream")
    options(parser, rounds=7)
    given = parser.parse_args(args)
    positive(parser, given, "rounds", "threads", "batch", "context", "images", "batches")
    if min(given.workers) < 0:
        parser.error("--workers are at least 0")

    machine = about(given)
    needed = given.tokens_per_second or training_rate(given.context)
    results = compare(given, needed)
    of = "given" if given.tokens_per_second else "GPT-2 124M at 50 % MFU of an H100, computed and not measured"
    lines = [f"b: the loader's, a: training's at {needed:,.0f} tokens/s ({of}); ms of a batch, wall time"]
    show(machine, results, given, *lines)


def training_rate(context: int) -> float:
    """Tokens per second of GPT-2 124M at 50 % of an H100's peak."""
    cfg = compose(["model=gpt_124m", "data.vocab=50257", f"model.context={max(context, 1024)}"])
    return H100 * MFU / make(cfg, "model").flops_per_token(context)


def compare(given: argparse.Namespace, needed: float) -> list[Result]:
    size = [f"data.batch_size={given.batch}", f"model.context={given.context}"]
    text = build_data(compose([*size, *given.words]))
    tokens, sources = given.batch * given.context, {}
    for workers in given.workers:
        sources[f"text, workers {workers}"] = (text, given.batch, workers)
        sources[f"images, workers {workers}"] = (_noise(given.images, "none"), given.images, workers)
        sources[f"images, crop_flip, workers {workers}"] = (_noise(given.images, "crop_flip"), given.images, workers)
    turns = {name: Turn(*source, batches=given.batches) for name, source in sources.items()}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(given.rounds + 1):
        for name, turn in turns.items():
            spent = turn()
            if number:  # the first one reads the text from the disk
                seconds[name].append(spent)
    results: list[Result] = []
    for name, turn in turns.items():
        spent = median(seconds[name])
        rates = {"batches_per_second": 1 / spent, "mb_per_second": turn.bytes / spent / 1e6}
        if name.startswith("text"):
            a = tokens / needed
            ratio: Result = {"name": f"training / {name}", "ratio": a / spent, "at_least": LEAST, "seconds_a": a}
            rates["tokens_per_second"] = tokens / spent
        else:
            ratio = {"name": name}
            rates["images_per_second"] = given.images / spent
        results.append(ratio | {"seconds_b": spent} | rates)
    return results


class Turn:
    """Draws so many batches and tells the seconds of one; goes on where it stopped, as training does."""

    def __init__(self, data: LightningDataModule, batch: int, workers: int, *, batches: int):
        loader = data.train_dataloader()
        assert isinstance(loader, TrainLoader)
        self.batches, self.bytes = batches, 0
        self._again = TrainLoader(loader.source, Share(batch, workers=workers), seed=0)
        self._open = iter(self._again)

    def __call__(self, clock: Callable[[], float] = time.perf_counter) -> float:
        start = clock()
        for _ in range(self.batches):
            batch = next(self._open, None)
            if batch is None:
                self._open = iter(self._again)
                batch = next(self._open)
        self.bytes = sum(part.nbytes for part in batch)
        return (clock() - start) / self.batches


@dataclass(kw_only=True, eq=False, repr=False)
class Noise(Pixels):
    """Random images of the size of CIFAR's."""

    count: int = 10_000

    def read(self) -> dict[str, Split]:
        bits = np.random.default_rng(0)
        images = bits.integers(0, 256, (self.count, 3, 32, 32), dtype=np.uint8)
        split = Split(images, np.arange(self.count) % 10)
        return {"train": split, "val": split, "test": split}


def _noise(batch: int, augment: str) -> Noise:
    data = Noise(batch_size=batch, augment=augment, count=max(10_000, batch))  # type: ignore[arg-type]
    data.prepare_data()
    return data
