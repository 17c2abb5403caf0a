"""Every placement with every norm layer in every model: two optimizer steps."""

from copy import deepcopy
from functools import cache
from itertools import product

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.nn import functional as F

from tests.menu import options
from trainkit.launch.preflight import check
from trainkit.norm_layer.stateful import advance
from trainkit.optimizer.partition import by_role, split

PLACEMENTS, LAYERS = options("norm"), options("norm_layer")
MODELS = {
    "gpt": ["model.depth=4", "model.width=16", "model.heads=2", "model.context=8"],
    "llama": ["model.depth=4", "model.width=16", "model.hidden=24", "model.heads=2", "model.context=8"],
    "vit": ["model.depth=4", "model.width=16", "model.heads=2", "model.patch=4"],
}
FACTS = {"vocab": 32, "bytes_per_token": 1.0, "classes": 10, "image": [1, 8, 8]}


@cache
def layer(name: str):
    """The node of a norm layer; groups that divide the small widths here."""
    node = check([f"norm_layer={name}"]).configs[0].norm_layer
    if "groups" in node:
        node.groups = 4
    return node


@pytest.mark.slow
@pytest.mark.parametrize(("model", "placement"), list(product(MODELS, PLACEMENTS)))
def test_two_steps(model, placement):
    """None of the combinations is refused, and in each every parameter gets a finite gradient."""
    base = check([f"model={model}", f"norm={placement}", *MODELS[model]]).configs[0]
    for name, value in FACTS.items():
        if name in base.data:
            OmegaConf.update(base, f"data.{name}", value)
    for name in LAYERS:
        cfg = deepcopy(base)
        cfg.norm_layer = layer(name)
        torch.manual_seed(0)
        net = instantiate(cfg.model, _convert_="all")
        factory, words = split(instantiate(cfg.optimizer, _convert_="all"))
        optimizer = by_role(net, factory, **words)
        projection = instantiate(cfg.projection)
        projection(net)
        inputs = torch.randint(32, (3, 8)) if model != "vit" else torch.randn(3, 1, 8, 8)
        targets = torch.randint(10, (24,) if model != "vit" else (3,))
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(inputs).flatten(0, -2), targets)
            loss.backward()
            assert loss.isfinite(), name
            for parameter, p in net.named_parameters():
                assert p.grad is not None, f"{name}: {parameter} has no gradient"
                assert p.grad.isfinite().all(), f"{name}: {parameter}"
            optimizer.step()
            projection(net)
            advance(net)
