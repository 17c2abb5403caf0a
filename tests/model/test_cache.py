"""Reading a text piece by piece with a cache gives the logits of reading it at once, under every placement."""

from copy import deepcopy

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from tests.menu import build, options
from trainkit.launch.compose import compose
from trainkit.model.parts.cache import Cache
from trainkit.model.parts.generate import looking, reads_alike
from trainkit.model.parts.rotary import Rotary

SIZES = {
    "gpt": ["model.depth=3", "model.width=16", "model.heads=2", "model.context=12"],
    "llama": ["model.depth=3", "model.width=16", "model.hidden=24", "model.heads=4", "model.context=12"],
}
# What averages over the positions of a text, in eval mode too; the last where a text varies more than the batches did.
LOOKING = {"batch_channel", "continual_norm", "evonorm_s0", "evonorm_s0a", "ibn", "instance", "evonorm_b0"}


def model(kind, *words):
    return scattered(build("model", f"model={kind}", *SIZES[kind], *words))


def scattered(net):
    """In float64, with parameters and running statistics away from their start, so that nothing hides."""
    generator = torch.Generator().manual_seed(1)
    net = net.double().eval()
    with torch.no_grad():
        for value in [*net.parameters(), *(b for name, b in net.named_buffers() if "running" in name)]:
            value.add_(0.3 * torch.rand(value.shape, generator=generator, dtype=value.dtype))
    return net


@torch.no_grad()
def piecewise(net, tokens, sizes):
    cache = Cache(net, net.context)
    with cache:
        return torch.cat([net(part) for part in tokens.split(sizes, 1)], 1)


def check(net, tokens=None):
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(2)) if tokens is None else tokens
    with torch.no_grad():
        whole = net(tokens)
    for sizes in ([1] * 12, [5, 1, 4, 2], [12]):
        torch.testing.assert_close(piecewise(net, tokens, sizes), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("placement", options("norm"))
def test_gpt_reads_alike_under_every_placement(placement):
    check(model("gpt", f"norm={placement}"))


@pytest.mark.parametrize("placement", options("norm"))
def test_llama_reads_alike_under_every_placement(placement):
    check(model("llama", f"norm={placement}", "model.kv_heads=2"))


@pytest.mark.parametrize("norm", ["head", "full"])
def test_norms_of_queries_and_keys_do_too(norm):
    check(model("llama", "norm=pre", f"model.qk_norm={norm}"))


@pytest.fixture(scope="module")
def composed():
    cfg = compose(["model=gpt", "norm=hybrid", *SIZES["gpt"]])  # norms on the stream, and on q, k and v per head
    OmegaConf.update(cfg, "data.vocab", 64)
    return cfg


@pytest.mark.parametrize("layer", options("norm_layer"))
def test_every_norm_layer_reads_alike_or_is_known_to_look_across_the_text(layer, composed):
    cfg = deepcopy(composed)
    cfg.norm_layer = compose([f"norm_layer={layer}"]).norm_layer
    if "groups" in cfg.norm_layer:
        cfg.norm_layer.groups = 4
    net = scattered(instantiate(cfg.model, _convert_="all"))
    tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(2))
    assert reads_alike(net, tokens[:, :8], net.context) == (layer not in LOOKING)
    if layer in LOOKING:
        assert type(net.blocks[0].mlp.norm).__name__ in looking(net)
        with torch.no_grad():
            assert not torch.equal(piecewise(net, tokens, [1] * 12), net(tokens))
    else:
        check(net, tokens)


def test_a_norm_of_the_users_own_that_looks_across_the_text_is_noticed():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(1, keepdim=True)

    net = model("gpt", "norm=pre")
    assert reads_alike(net, torch.arange(8)[None], net.context)
    net.blocks[1].mlp.pre = Centred()
    assert not reads_alike(net, torch.arange(8)[None], net.context)


def test_outside_of_its_context_a_cache_changes_nothing():
    net, tokens = model("gpt"), torch.arange(12)[None]
    with torch.no_grad():
        before = net(tokens)
        cache = Cache(net, net.context)
        with cache:
            net(tokens[:, :5])
        with pytest.raises(IndexError), cache:
            net(torch.full((1, 1), 999))
        assert cache.length == 5
        assert torch.equal(net(tokens), before)


def test_a_cache_that_forgets_begins_anew():
    net, tokens = model("llama"), torch.arange(12)[None]
    cache = Cache(net, net.context)
    with torch.no_grad(), cache:
        first = net(tokens)
        cache.forget()
        torch.testing.assert_close(net(tokens.flip(1)), piecewise(net, tokens.flip(1), [12]))
        cache.forget()
        assert torch.equal(net(tokens), first)


def test_a_full_context_is_refused():
    net = model("gpt")
    cache = Cache(net, net.context)
    with torch.no_grad(), cache:
        net(torch.zeros(1, 12, dtype=torch.int64))
        with pytest.raises(ValueError, match="reads at most 12 tokens at once; got 13"):
            net(torch.zeros(1, 1, dtype=torch.int64))


def test_rotary_turns_by_the_position_of_each_token():
    rotary, x = Rotary(6, 10).double(), torch.randn(2, 3, 10, 6, dtype=torch.float64)
    parts = [rotary(x[:, :, :4]), rotary(x[:, :, 4:7], 4), rotary(x[:, :, 7:], 7)]
    assert torch.equal(torch.cat(parts, 2), rotary(x))
