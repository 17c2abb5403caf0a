"""From `python run.py` to the first training step, against importing the libraries and building the model alone."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from trainkit.bench.record import Result, about, options, positive, show
from trainkit.launch.sources import RUN

LIMITS = {"run": 1.15, "two ranks": 1.3}
TIMEOUT = 300.0  # seconds that one start may take
ALONE = """
import sys, time
import lightning, torchmetrics, wandb
from trainkit.model.gpt import GPT
from trainkit.norm.pre import Pre
from trainkit.norm_layer.layer import LayerNorm
GPT(256, Pre(LayerNorm))
open(sys.argv[1], "w").write(f"{time.time()} {time.process_time()}")
"""
PLUGIN = "first_step"
# A callback for the run: it writes when the first training step begins, and ends every process there.
MARK = """
import os, pathlib, time
from lightning.pytorch import Callback
class Mark(Callback):
    def __init__(self, path):
        self.path = pathlib.Path(path)
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.is_global_zero:
            self.path.write_text(f"{time.time()} {time.process_time()}")
        trainer.strategy.barrier()
        os._exit(0)
"""


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench startup", description=__doc__)
    parser.add_argument("--no-ranks", action="store_true", help="without the start of two ranks")
    parser.add_argument("words", nargs="*", help="further words of the run's command line, as model=llama")
    options(parser, rounds=5)
    given = parser.parse_args(args)
    positive(parser, given, "rounds", "threads")

    machine = about(given)
    results = compare(given)
    show(machine, results, given, f"median of {given.rounds} rounds; {given.clock} time of the first process")


def compare(given: argparse.Namespace) -> list[Result]:
    """Rounds of one start each, in turn; the first, which reads from the disk and prepares the data, is dropped."""
    with TemporaryDirectory() as folder:
        mark = Path(folder, "mark")
        Path(folder, f"{PLUGIN}.py").write_text(MARK)
        run = [sys.executable, str(RUN), f"paths.log_dir={folder}/logs", f"paths.cache_dir={folder}/cache"]
        run += [f"plugins=[{PLUGIN}]", f"+callbacks.mark._target_={PLUGIN}.Mark", f"+callbacks.mark.path={mark}"]
        run += [f"trainer.threads={given.threads}", *given.words]
        commands = {"alone": [sys.executable, "-c", ALONE, str(mark)], "run": run}
        if not given.no_ranks:
            ranks = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"]
            commands["two ranks"] = [*run, *ranks]
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(given.rounds + 1):
            for name, command in commands.items():
                spent = start(command, mark, given)
                if number:
                    seconds[name].append(spent)
    results = [entry("run.py to the first step / imports and model", seconds["run"], seconds["alone"], "run")]
    if not given.no_ranks:
        results.append(entry("two ranks / one, to the first step", seconds["two ranks"], seconds["run"], "two ranks"))
    return results


def entry(name: str, a: list[float], b: list[float], limit: str) -> Result:
    ratio = median(x / y for x, y in zip(a, b, strict=True))
    return {"name": name, "ratio": ratio, "at_most": LIMITS[limit], "seconds_a": median(a), "seconds_b": median(b)}


def start(command: Sequence[str], mark: Path, given: argparse.Namespace) -> float:
    """Seconds until the process wrote its mark; of processor time, those of that process alone."""
    mark.unlink(missing_ok=True)
    environment = os.environ | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": str(given.threads)}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(RUN.parent), str(mark.parent), os.environ.get("PYTHONPATH")])
    )
    began = time.time()
    done = subprocess.run(command, cwd=mark.parent, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    if not mark.is_file():
        raise RuntimeError(f"a start failed: {' '.join(command[:2])}: {done.stderr.strip()[-500:]}")
    wall, cpu = (float(value) for value in mark.read_text().split())
    return cpu if given.clock == "cpu" else wall - began
