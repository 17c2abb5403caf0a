"""What a bench says: the machine, the versions and the ratios, as a table or as one JSON object."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from trainkit.bench.timing import hardware
from trainkit.launch.versions import versions

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Result = dict[str, Any]


def options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The options that every bench of runs has."""
    parser.add_argument("--rounds", type=int, default=rounds, help="timed rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each operation")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: of all threads, for a busy machine")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")


def positive(parser: argparse.ArgumentParser, given: argparse.Namespace, *names: str) -> None:
    """Ends with one line unless each of these options, a number or several, is at least 1."""
    for name in names:
        value = getattr(given, name)
        if min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')} is at least 1")


def about(given: argparse.Namespace) -> dict[str, Any]:
    """The machine and the versions; fixes the threads first. Load is that of the last minute, when the bench begins."""
    torch.set_num_threads(given.threads)
    device = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"hardware": hardware() | device, "versions": versions()}


def show(machine: dict[str, Any], results: Sequence[Result], given: argparse.Namespace, *lines: str) -> None:
    """Prints a bench's outcome; lines: what was compared."""
    if given.json:
        print(json.dumps(machine | {"results": list(results)}))
        return
    print("\n".join(f"{key}: {value}" for part in machine.values() for key, value in part.items()))
    print("\n".join(lines))
    print(table(results))


def table(results: Sequence[Result]) -> str:
    """One line per result: its ratio = seconds_a / seconds_b, the limit, both times, and whatever else it holds."""
    wide = max((len(result["name"]) for result in results), default=0) + 2
    lines = [f"\n{'a / b':{wide}}{'ratio':>8}{'limit':>9}{'a, ms':>11}{'b, ms':>11}"]
    for result in results:
        cells = f"{result['ratio']:8.3f}" if "ratio" in result else f"{'':8}"
        cells += f"{limit(result):>9}"
        cells += "".join(f"{1e3 * result[key]:11.3f}" if key in result else f"{'':11}" for key in SECONDS)
        lines.append((f"{result['name']:{wide}}{cells}" + _rest(result)).rstrip())
    return "\n".join(lines)


SECONDS = ("seconds_a", "seconds_b")
SHOWN = ("name", "ratio", "at_most", "at_least", *SECONDS)


def limit(result: Result) -> str:
    """`<= 1.05`, `>= 10`, or nothing where a result has no limit."""
    if "at_most" in result:
        return f"<= {result['at_most']:g}"
    return f">= {result['at_least']:g}" if "at_least" in result else ""


def _rest(result: Result) -> str:
    """What a result holds besides, numbers to four digits."""
    rest = {key: value for key, value in result.items() if key not in SHOWN}
    said = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items())
    return "".join(f"  {part}" for part in said)
