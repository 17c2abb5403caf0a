"""Time and memory of every norm layer's forward and backward against LayerNorm and rms_norm of torch."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.bench.timing import Step, hardware, interleaved, kept_bytes, peak_bytes
from trainkit.launch.compose import compose
from trainkit.launch.job import make
from trainkit.launch.sources import Folders
from trainkit.launch.versions import versions

REFERENCES = {"LayerNorm": nn.LayerNorm, "rms_norm": nn.RMSNorm}  # of torch; nn.RMSNorm calls F.rms_norm
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench norm_layer", description=__doc__)
    parser.add_argument("--shape", type=int, nargs="+", default=[8, 1024, 768], help="of x, the channels last")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each layer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each operation")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="only these of conf/norm_layer")
    parser.add_argument("--quick", action="store_true", help="3 rounds, eager only")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the tables")
    given = parser.parse_args(args)
    menu = Folders().options("norm_layer")
    unknown = sorted(set(given.layers or []) - set(menu))
    if unknown:
        parser.error(f"conf/norm_layer has no {', '.join(unknown)}; it has {', '.join(menu)}")
    if given.rounds < 1 or given.threads < 1 or min(given.shape) < 1:
        parser.error("--rounds, --threads and every number of --shape are at least 1")
    modes, rounds = (("eager",), 3) if given.quick else (("eager", "compiled"), given.rounds)

    torch.set_num_threads(given.threads)
    about = {"hardware": hardware(), "versions": versions()}
    if not given.json:
        print("\n".join(f"{key}: {value}" for part in about.values() for key, value in part.items()))
        print(f"x: {tuple(given.shape)}; forward and backward; median of {rounds} interleaved rounds")
        print("kept: activations stored for the backward; peak: most memory held; both in sizes of x")
    results = []
    for mode in modes:
        for dtype in DTYPES:
            rows = compare(given.layers or menu, mode, dtype, given.shape, rounds)
            if not given.json:
                print(table(rows, f"{mode}, {dtype}"), flush=True)
            results += as_results(rows, f"{mode}, {dtype}")
    if given.json:
        print(json.dumps(about | {"results": results}))


def compare(
    names: Sequence[str], mode: str, dtype: str, shape: Sequence[int], rounds: int
) -> dict[str, dict[str, Any]]:
    """By layer, references first: seconds of a step, and the memory kept and at the peak in sizes of x."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    x = torch.randn(*shape).to(DTYPES[dtype]).requires_grad_()
    gy = torch.randn(*shape).to(DTYPES[dtype])
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name in [*REFERENCES, *names]:
        if sys.stderr.isatty():
            print(f"\r{mode}, {dtype}: {name:20}", end="\r", file=sys.stderr, flush=True)
        layer = build(name, shape[-1]).to(DTYPES[dtype])
        run = torch.compile(layer) if mode == "compiled" else layer
        steps[name] = step(run, x, gy)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a layer's advice on training concerns no bench
            for _ in range(2):  # compiles, and takes the memory that is used again
                steps[name]()
            for tensor in (x, *layer.parameters()):
                tensor.grad = None
            rows[name] = {"kept": kept_bytes(run, x) / x.nbytes, "peak": peak_bytes(steps[name]) / x.nbytes}
    for name, seconds in interleaved(steps, rounds).items():
        rows[name]["seconds"] = seconds
    return rows


def build(name: str, width: int) -> nn.Module:
    if name in REFERENCES:
        return REFERENCES[name](width)
    return make(compose([f"norm_layer={name}"]), "norm_layer")(width)


def step(layer: nn.Module, x: Tensor, gy: Tensor) -> Step:
    parameters = [x, *layer.parameters()]

    def forward_backward() -> None:
        for p in parameters:
            p.grad = None
        layer(x).backward(gy)

    return forward_backward


def table(rows: dict[str, dict[str, Any]], title: str) -> str:
    heads = [f"/ {reference}" for reference in REFERENCES]
    lines = [f"\n{title:20}{'ms':>9}" + "".join(f"{head:>13}" for head in heads) + f"{'kept':>8}{'peak':>8}"]
    for name, row in rows.items():
        ratios = "".join(f"{row['seconds'] / rows[reference]['seconds']:13.2f}" for reference in REFERENCES)
        lines.append(f"{name:20}{row['seconds'] * 1e3:9.2f}{ratios}{row['kept']:8.2f}{row['peak']:8.2f}")
    return "\n".join(lines)


def as_results(rows: dict[str, dict[str, Any]], title: str) -> list[dict[str, Any]]:
    """One entry per layer and reference; a is the layer, b the reference, and memory is in sizes of x."""
    results = []
    for name in rows:
        for reference in REFERENCES if name not in REFERENCES else ():
            a, b = rows[name], rows[reference]
            entry = {"name": f"{name} / {reference}, {title}", "ratio": a["seconds"] / b["seconds"]}
            entry |= {
                f"{key}_{side}": row[key] for key in ("seconds", "kept", "peak") for side, row in (("a", a), ("b", b))
            }
            results.append(entry)
    return results
