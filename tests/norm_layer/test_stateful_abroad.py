"""Layers with a memory under torch.compile, and on several ranks."""

import copy

import pytest
import torch
from torch import Tensor, distributed, multiprocessing

from trainkit.norm_layer.stateful import advance

from .stateful import LAYERS, WIDTH, counts, data, float64, layers, make, same, state, train  # noqa: F401

pytestmark = pytest.mark.slow


@layers
@counts
def test_compiled(name, count):
    """Traced and differentiated as torch.compile does it; only machine code is not generated."""
    torch._dynamo.reset()
    eager = make(name, count=count)
    traced = copy.deepcopy(eager)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=count == "step")
    for x, gy in data(3):
        expected, actual = train(eager, x, gy), train(compiled, x, gy)
        advance(eager)
        advance(traced)
        assert torch.allclose(actual[0], expected[0], rtol=1e-12)
        assert torch.allclose(actual[1], expected[1], rtol=1e-9, atol=1e-12)
    assert same(state(eager), state(traced), rtol=1e-12)


RANKS = 2
SHARES = [1, 3]  # samples of each rank; means over all tokens must not become means of means


def on_rank(rank: int, folder: str) -> None:
    """Its share of three batches through every layer; what came out into a file."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save({name: outcome(name, rank) for name in LAYERS}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def outcome(name: str, rank: int | None) -> dict[str, list[Tensor] | dict[str, Tensor]]:
    """Outputs, input gradients, parameter gradients and state after three steps, the second one with padding."""
    torch.manual_seed(1)
    layer, found = make(name, count="step", sync="none" if rank is None else "mean"), []
    for t, (x, gy) in enumerate(data(3, sum(SHARES), 5, WIDTH)):
        pad = torch.rand(x.shape[:2]) < (0.4 if t == 1 else 0)
        if rank is not None:
            x, gy, pad = (v.split(SHARES)[rank] for v in (x, gy, pad))
        found += train(layer, x, gy, pad_mask=pad)
        advance(layer)
    return {"rows": found, "gradients": [p.grad for p in layer.parameters()], "state": state(layer)}


def test_ranks_together_equal_one(tmp_path):
    multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    for name in LAYERS:
        expected, found = outcome(name, None), [rank[name] for rank in ranks]
        for row, parts in zip(expected["rows"], zip(*(f["rows"] for f in found), strict=True), strict=True):
            assert torch.allclose(torch.cat(parts), row, rtol=1e-9, atol=1e-12), name
        for g, parts in zip(expected["gradients"], zip(*(f["gradients"] for f in found), strict=True), strict=True):
            assert torch.allclose(sum(parts), g, rtol=1e-9, atol=1e-12), name
        assert all(same(f["state"], expected["state"], rtol=1e-9) for f in found), name
