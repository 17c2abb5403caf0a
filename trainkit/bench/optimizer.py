"""Time per step, state and peak memory of every optimizer on the parameters of a 124M GPT, against fused AdamW."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from trainkit.bench.timing import Step, hardware, interleaved, peak_bytes
from trainkit.launch.compose import compose
from trainkit.launch.job import make
from trainkit.launch.sources import Folders
from trainkit.launch.versions import versions
from trainkit.optimizer.partition import by_role, split

REFERENCE = "AdamW(fused)"
WIDTH, LAYERS, VOCABULARY, CONTEXT = 768, 12, 50304, 1024  # GPT-2 124M
Claim = Callable[[int, int, int], float]

# Bytes of state per entry of a matrix with sides lo <= hi, in float32, as the papers give them; r: the rank.
CLAIMS: dict[str, Claim] = {
    **dict.fromkeys(("adamw", "adamp", "lamb", "hf_adamw"), lambda lo, hi, r: 8),
    **dict.fromkeys(("adagrad", "sgd", "sgdp", "lars", "lion", "muon", "auon", "hybrid_auon"), lambda lo, hi, r: 4),
    **dict.fromkeys(("sinkgd", "swan"), lambda lo, hi, r: 0),
    "adagrad_norm": lambda lo, hi, r: 0,
    "diffgrad": lambda lo, hi, r: 12,
    "conda": lambda lo, hi, r: 8 + 4 * lo / hi,
    **dict.fromkeys(("galore", "fira"), lambda lo, hi, r: 8 * r / lo + 4 * r / hi),
    "dct_adamw": lambda lo, hi, r: 8 * r / lo + 8 * r / (lo * hi),  # and the indices of the columns
    "trion": lambda lo, hi, r: 4,
    **dict.fromkeys(("sam", "asam"), lambda lo, hi, r: 4 + 8),  # around AdamW
}


def main(args: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainkit.bench optimizer", description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the number of parameters, 0.01 to 1")
    parser.add_argument("--rounds", type=int, default=11, help="timed steps of each optimizer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each operation")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="only these of conf/optimizer")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings, such as optimizer.rank=96")
    parser.add_argument("--compile", action="store_true", help="compiled update rules, where there are any")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the parameters")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    given = parser.parse_args(args)
    menu = Folders().options("optimizer")
    unknown = sorted(set(given.optimizers or []) - set(menu))
    if unknown:
        parser.error(f"conf/optimizer has no {', '.join(unknown)}; it has {', '.join(menu)}")
    if given.rounds < 1 or given.threads < 1 or not 0.01 <= given.scale <= 1:
        parser.error("--rounds and --threads are at least 1, --scale lies between 0.01 and 1")

    torch.set_num_threads(given.threads)
    about = {"hardware": hardware(), "versions": versions()}
    rows = compare(given.optimizers or menu, given)
    if given.json:
        print(json.dumps(about | {"scale": given.scale, "dtype": given.dtype, "results": results(rows)}))
        return
    print("\n".join(f"{key}: {value}" for part in about.values() for key, value in part.items()))
    count = next(iter(rows.values()))["parameters"]
    print(f"{count:,} parameters in {given.dtype}; median of {given.rounds} steps, each interleaved with {REFERENCE}")
    print("state: measured bytes per parameter, of all and of the matrices alone; claim: the paper's, of the matrices")
    print(table(rows))


class Weights(nn.Module):
    """The parameters of a GPT by their roles, with gradients, in a model that computes nothing."""

    def __init__(self, scale: float, *, dtype: torch.dtype, device: str):
        super().__init__()
        width = max(16, round(WIDTH * scale**0.5 / 16) * 16)
        self.tokens = nn.Embedding(round(VOCABULARY * scale**0.5), width, dtype=dtype, device=device)
        self.positions = nn.Embedding(round(CONTEXT * scale**0.5), width, dtype=dtype, device=device)
        sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
        self.linears = nn.ModuleList(
            nn.Linear(*size, dtype=dtype, device=device) for _ in range(LAYERS) for size in sizes
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width, dtype=dtype, device=device) for _ in range(2 * LAYERS + 1))
        generator = torch.Generator(device).manual_seed(0)
        for p in self.parameters():
            with torch.no_grad():
                p.normal_(0, 0.02, generator=generator)
            p.grad = torch.empty_like(p).normal_(0, 1e-3, generator=generator)


def compare(names: Sequence[str], given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By optimizer: seconds per step, its own and those of the reference interleaved with it, and its memory."""
    model = Weights(given.scale, dtype=getattr(torch, given.dtype), device=given.device)
    total = sum(p.numel() for p in model.parameters())
    matrices = [p for linear in model.linears for p in linear.parameters() if p.ndim > 1]
    entries = sum(p.numel() for p in matrices)
    start = [p.detach().clone() for p in model.parameters()]
    reference = stepper(AdamW(model.parameters(), fused=True), given.device)
    reference()
    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        if sys.stderr.isatty():
            print(f"\r{name:20}", end="\r", file=sys.stderr, flush=True)
        optimizer = build(name, model, given)
        step = stepper(optimizer, given.device)
        for _ in range(2):  # makes the state, compiles, and passes the first refresh of a subspace
            step()
        row: dict[str, Any] = {"parameters": total, "state": state_bytes(optimizer) / total}
        row["matrix_state"] = state_bytes(optimizer, matrices) / entries
        row["peak"] = peak_bytes(step) if given.device == "cpu" else peak_on_device(step)
        rank = next((group["rank"] for group in optimizer.param_groups if group.get("rank")), 0)
        if name in CLAIMS:
            sides = [(min(p.shape), max(p.shape)) for p in matrices]
            row["claim"] = sum(lo * hi * CLAIMS[name](lo, hi, rank) for lo, hi in sides) / entries
        seconds = interleaved({"a": step, "b": reference}, given.rounds)
        rows[name] = row | {"seconds": seconds["a"], "reference_seconds": seconds["b"]}
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), start)
    return rows


def build(name: str, model: nn.Module, given: argparse.Namespace) -> Optimizer:
    """What a run would train `model` with; settings that this optimizer does not have are left out."""
    settings = compose([f"optimizer={name}"]).optimizer
    wanted = [*given.set, *(["optimizer.compile=true"] if given.compile else [])]
    words = [word for word in wanted if word.partition("=")[0].removeprefix("optimizer.") in settings]
    factory, options = split(make(compose([f"optimizer={name}", *words]), "optimizer"))
    return by_role(model, factory, **options)


def stepper(optimizer: Optimizer, device: str) -> Step:
    """A step; SAM and its like get a closure that leaves the gradients as they are."""

    def step() -> None:
        optimizer.step(lambda: None)
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def state_bytes(optimizer: Optimizer, parameters: Sequence[Tensor] | None = None) -> int:
    """Bytes of the tensors in an optimizer's state, counters of one number left out."""
    chosen = optimizer.state if parameters is None else [p for p in parameters if p in optimizer.state]
    tensors = {id(t): t for p in chosen for t in optimizer.state[p].values() if isinstance(t, Tensor) and t.numel() > 1}
    return sum(t.nbytes for t in tensors.values())


def peak_on_device(step: Step) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def table(rows: dict[str, dict[str, Any]]) -> str:
    heads = ("ms", "/ AdamW", "state", "matrices", "claim", "peak MiB")
    lines = [f"\n{'optimizer':16}" + "".join(f"{head:>10}" for head in heads)]
    for name, row in rows.items():
        cells = f"{row['seconds'] * 1e3:10.1f}{row['seconds'] / row['reference_seconds']:10.2f}{row['state']:10.3f}"
        claim = f"{row['claim']:10.3f}" if "claim" in row else f"{'':10}"
        lines.append(f"{name:16}{cells}{row['matrix_state']:10.3f}{claim}{row['peak'] / 2**20:10.1f}")
    return "\n".join(lines)


def results(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry per optimizer."""
    return [
        {"name": f"{name} / {REFERENCE}", "ratio": row["seconds"] / row["reference_seconds"], **row}
        for name, row in rows.items()
    ]
