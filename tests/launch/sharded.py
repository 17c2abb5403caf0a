"""A small network trained by one process, or sharded over several: what tests/test_fsdp.py compares."""

from __future__ import annotations

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.menu import options
from trainkit.launch.compose import compose
from trainkit.launch.process.fsdp import shard, unfuse
from trainkit.launch.sources import CONF
from trainkit.measure.grad_norm import grad_norm, grad_norm_l1
from trainkit.measure.shards import is_sharded
from trainkit.measure.sites import sites
from trainkit.norm_layer.stateful import advance
from trainkit.optimizer.partition import by_role, split

RANKS, STEPS, BATCH, LENGTH, VOCAB = 2, 4, 4, 8, 13
SMALL = ["model.depth=2", "model.width=12", "model.heads=2", f"model.context={LENGTH}"]
GROUPS = ("model", "optimizer", "gradient", "projection")
Case = tuple[str, ...]
Nodes = dict[str, Any]


def optimizers() -> list[Case]:
    return [(f"optimizer={name}",) for name in options("optimizer")]


def treatments() -> list[Case]:
    per_tensor = [
        ("gradient=norm_growth_limit", "gradient.of=tensor"),
        ("gradient=clip_per_layer", "gradient.relative=true"),
    ]
    return [(f"gradient={name}",) for name in options("gradient")] + per_tensor


def projections() -> list[Case]:
    return [(f"projection={name}",) for name in options("projection")]


def norms() -> list[Case]:
    grouped = {
        name for name in options("norm_layer") if "groups" in OmegaConf.load(CONF / "norm_layer" / f"{name}.yaml")
    }
    layers = [(f"norm_layer={n}", *(["norm_layer.groups=4"] if n in grouped else [])) for n in options("norm_layer")]
    return layers + [(f"norm={name}",) for name in options("norm")]


def configured(case: Case) -> Nodes:
    """What is built of a case: composing takes longer than training, so it is done once for all processes."""
    cfg = compose(["model=gpt", *SMALL, *case])
    OmegaConf.update(cfg, "data.vocab", VOCAB)
    return {group: OmegaConf.to_container(cfg[group], resolve=True) for group in GROUPS}


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator) for _ in range(STEPS)]


def outcome(nodes: Nodes, how: str) -> dict[str, Any]:
    """What STEPS steps in float64 leave of the weights, whole, or the sentence by which they are refused.

    how: alone, or by this process as one of RANKS: fsdp, of a model that is sharded over them, or ddp.
    """
    torch.manual_seed(0)
    model = instantiate(nodes["model"], _convert_="all").double()
    if how == "fsdp":
        shard(model, init_device_mesh("cpu", (RANKS,)), precision="64-true")
        assert all(is_sharded(p) for p in model.parameters())
    try:
        said = train(model, nodes, how)
    except ValueError as error:
        return {"refused": str(error)}
    state = {k: v.full_tensor() if is_sharded(v) else v for k, v in model.state_dict().items()}
    return {"weights": {k: v.detach().clone() for k, v in state.items()}, "said": said}


def train(model: torch.nn.Module, nodes: Nodes, how: str) -> list[dict[str, float]]:
    made, gradient, projection = (instantiate(nodes[group], _convert_="all") for group in GROUPS[1:])
    factory, roles = split(made)
    optimizer = by_role(model, factory, **roles)
    unfuse(optimizer)
    for plugin, given in ((gradient, (model, optimizer)), (projection, (optimizer,))):
        if hasattr(plugin, "prepare"):
            plugin.prepare(*given)
    projection(model)
    said: list[dict[str, float]] = []
    forward = DistributedDataParallel(model) if how == "ddp" else model
    for batch in batches():
        mine = batch if how == "alone" else batch.chunk(RANKS)[distributed.get_rank()]

        def closure(mine: torch.Tensor = mine) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(forward(mine[:, :-1]).flatten(0, 1), mine[:, 1:].flatten())
            loss.backward()
            found = grad_norm(sites(model)) | {"l1": grad_norm_l1(model.parameters())}
            found |= gradient([p.grad for p in model.parameters() if p.grad is not None])
            said.append({name: float(value) for name, value in found.items()})
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
        projection(model)
        advance(model)
    return said


def on_rank(rank: int, folder: str, cases: list[Nodes], ways: list[str]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    torch.save([{how: outcome(case, how) for how in ways} for case in cases], f"{folder}/{rank}.pt")
    distributed.destroy_process_group()
