"""Every parameter has one label, and the label says what the parameter does, under every placement."""

import pytest
import torch
from torch import nn

from trainkit.measure.sites import sites
from trainkit.norm.hyper import Hyper
from trainkit.norm.peri import Peri
from trainkit.norm.placement import Placement, Site
from trainkit.norm.post import Post
from trainkit.norm.pre import Pre
from trainkit.norm.skipinit import SkipInit
from trainkit.norm_layer.layer import LayerNorm

WIDTH = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm = nn.LayerNorm(WIDTH)
        self.temperature = nn.Parameter(torch.ones(2))


class Block(nn.Module):
    def __init__(self, norm: Placement, layer: int):
        super().__init__()
        site = Site("attn", WIDTH, layer=layer, depth=2, index=2 * layer, count=4)
        self.attn = norm.around(Attention(), site)
        self.mlp = norm.around(nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)), site)


class Model(nn.Module):
    def __init__(self, norm: Placement, tie: bool = False):
        super().__init__()
        self.embed, self.position = nn.Embedding(5, WIDTH), nn.Embedding(4, WIDTH)
        self.before = norm.before(Site("embed", WIDTH))
        self.blocks = nn.ModuleList(Block(norm, layer) for layer in range(2))
        self.after = norm.after(Site("final", WIDTH))
        self.head = nn.Linear(WIDTH, 5, bias=False)
        if tie:
            self.head.weight = self.embed.weight


def names(model: nn.Module) -> dict[str, list[str]]:
    """Labels with the names of their parameters, which are easier to compare than tensors."""
    known = {parameter: name for name, parameter in model.named_parameters()}
    return {label: [known[p] for p in parameters] for label, parameters in sites(model).items()}


@pytest.mark.parametrize("make", [Pre, Post, Peri, SkipInit, Hyper])
def test_every_parameter_has_exactly_one_label(make):
    model = Model(make(LayerNorm))
    labelled = [p for group in sites(model).values() for p in group]
    assert sorted(map(id, labelled)) == sorted(map(id, model.parameters()))


@pytest.mark.parametrize("make", [Pre, Post, Peri, SkipInit, Hyper])
def test_a_sublayers_own_weights_are_the_same_under_every_placement(make):
    found = names(Model(make(LayerNorm)))
    attn = ["temperature", "qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    assert found["blocks.1.attn"] == [f"blocks.1.attn.f.{name}" for name in attn]
    assert found["blocks.1.mlp"] == [f"blocks.1.mlp.f.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")]
    assert found["embed"] == ["embed.weight", "position.weight"]
    assert found["head"] == ["head.weight"]


def test_norms_inside_and_around_a_sublayer_count_together():
    found = names(Model(Peri(LayerNorm)))
    assert {name.rpartition(".")[0] for name in found["blocks.0.norm"]} == {
        "blocks.0.attn.pre", "blocks.0.attn.out", "blocks.0.attn.f.q_norm", "blocks.0.mlp.pre", "blocks.0.mlp.out",
    }  # fmt: skip
    assert {name.split(".")[0] for name in found["norm"]} == {"before", "after"}


def test_what_a_placement_learns_itself_is_the_residuals():
    assert names(Model(SkipInit(LayerNorm)))["blocks.0.residual"] == ["blocks.0.attn.scale", "blocks.0.mlp.scale"]
    mixing = names(Model(Hyper(LayerNorm)))["blocks.0.residual"]
    assert "blocks.0.attn.read_mix" in mixing
    assert not any(".pre." in name for name in mixing)


def test_a_tied_head_counts_as_the_embedding_and_a_frozen_parameter_not_at_all():
    model = Model(Pre(LayerNorm), tie=True)
    model.position.weight.requires_grad_(False)
    found = names(model)
    assert found["embed"] == ["embed.weight"]
    assert "head" not in found


def test_compiled_models_and_blocks_keep_their_labels():
    model = Model(Peri(LayerNorm))
    expected = list(sites(model))
    model.blocks[0] = torch.compile(model.blocks[0])
    assert list(sites(torch.compile(model))) == expected  # type: ignore[arg-type]


def test_a_model_without_wrappers_or_blocks_is_labelled_as_far_as_it_goes():
    layer = nn.TransformerEncoderLayer(WIDTH, 2, batch_first=True)
    stages = nn.ModuleDict({"0": nn.ModuleDict({"blocks": nn.ModuleList([layer])})})
    model = nn.ModuleDict({"stem": nn.Conv2d(3, WIDTH, 3), "stages": stages})
    found = names(model)
    assert found["stem"] == ["stem.weight", "stem.bias"]
    assert "stages.0.blocks.0.linear1.weight" in found["stages.0.blocks.0.linear1"]
    assert {name.split(".")[4] for name in found["stages.0.blocks.0.norm"]} == {"norm1", "norm2"}
