"""sync=mean: layers of convolutional networks on two ranks are the layers on one."""

import pytest
import torch
from torch import distributed, multiprocessing

from trainkit.model.parts.region_norm import RegionNorm
from trainkit.norm_layer.batch_channel import BatchChannelNorm
from trainkit.norm_layer.evonorm_b0 import EvoNormB0
from trainkit.norm_layer.ibn import IBN
from trainkit.norm_layer.stateful import advance

from .stateful import WIDTH, data, float64, state, train  # noqa: F401

pytestmark = pytest.mark.slow

LAYERS = {
    "evonorm_b0": lambda sync: EvoNormB0(WIDTH, axis=1, count="step", sync=sync),
    "bcn": lambda sync: BatchChannelNorm(WIDTH, axis=1, groups=2, count="step", sync=sync),
    "bcn_estimated": lambda sync: BatchChannelNorm(WIDTH, axis=1, groups=2, statistics="estimated", sync=sync),
    "ibn": lambda sync: IBN(WIDTH, axis=1, count="step", sync=sync),
    "region": lambda sync: RegionNorm(WIDTH, sync=sync),
}
SHARES = [1, 3]  # samples of each rank


def on_rank(rank: int, folder: str) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(SHARES))
    torch.save({name: outcome(name, rank) for name in LAYERS}, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def outcome(name: str, rank: int | None) -> dict:
    torch.manual_seed(1)
    layer, found = LAYERS[name]("none" if rank is None else "mean"), []
    for x, gy in data(3, sum(SHARES), WIDTH, 3, 2):
        inputs = {"mask": (x[:, :1] > 0).double()} if name == "region" else {}
        if rank is not None:
            x, gy = (v.split(SHARES)[rank] for v in (x, gy))
            inputs = {key: v.split(SHARES)[rank] for key, v in inputs.items()}
        found += train(layer, x, gy, **inputs)
        advance(layer)
    return {"rows": found, "gradients": [p.grad for p in layer.parameters()], "state": state(layer)}


def test_ranks_together_equal_one(tmp_path):
    multiprocessing.spawn(on_rank, (str(tmp_path),), nprocs=len(SHARES))
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SHARES))]
    for name in LAYERS:
        expected, found = outcome(name, None), [rank[name] for rank in ranks]
        for row, parts in zip(expected["rows"], zip(*(f["rows"] for f in found), strict=True), strict=True):
            assert torch.allclose(torch.cat(parts), row, rtol=1e-9, atol=1e-12), name
        for g, parts in zip(expected["gradients"], zip(*(f["gradients"] for f in found), strict=True), strict=True):
            assert torch.allclose(sum(parts), g, rtol=1e-9, atol=1e-12), name
        for f in found:
            assert all(torch.allclose(f["state"][k], v, rtol=1e-9) for k, v in expected["state"].items()), name
