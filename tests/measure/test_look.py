"""Hidden states between blocks, networks without one of them, and all activation measures at once."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainkit.measure import representation as r
from trainkit.measure.attention import attention_entropy, attention_logits
from trainkit.measure.blocks import Recording, blocks, hidden_state, without
from trainkit.measure.look import inspect, look
from trainkit.measure.plasticity import effective_rank, nuclear_norm
from trainkit.model.cnn import ConvNet
from trainkit.model.gpt import GPT
from trainkit.model.mlp import ResidualMLP
from trainkit.norm.hyper import Hyper
from trainkit.norm.pre import Pre
from trainkit.norm.residual_dual import ResidualDual
from trainkit.norm_layer.batch import BatchNorm
from trainkit.norm_layer.layer import LayerNorm

VOCAB, DEPTH, WIDTH, LENGTH = 11, 3, 16, 6
MEASURES = ("hidden_variance", "hidden_mean_square", "hidden_max", "massive_ratio", "massive_count", "residual_sink")
MEASURES += ("hidden_rank", "hidden_nuclear_norm")


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def gpt(placement=Pre, **options):
    torch.manual_seed(0)
    model = GPT(VOCAB, placement(LayerNorm), depth=DEPTH, width=WIDTH, heads=2, context=LENGTH, **options).double()
    return SimpleNamespace(model=model, loss=loss)


def batches(count=2):
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(VOCAB, (3, LENGTH + 1), generator=generator) for _ in range(count)]
    return [(b[:, :-1], b[:, 1:]) for b in drawn]


def states(task, batch):
    """The hidden states of a GPT, its forward pass written out: [input of block 0, output of block 0, …]."""
    model = task.model.eval()
    with torch.no_grad():
        found = [model.before(model.features(batch[0]))]
        for block in model.blocks:
            found.append(block(found[-1]))
    return found


def test_every_number_is_that_of_a_pass_written_out():
    task, given = gpt(), batches()
    found = look(task, given)
    hidden = [torch.stack(states(task, batch)) for batch in given]  # (L, B, T, C) of each batch
    both = torch.cat(hidden, dim=1)
    for i, name in enumerate(["embed", *(f"blocks.{n}" for n in range(DEPTH))]):
        h = both[i]
        assert found[f"hidden_variance/{name}"] == pytest.approx(float(h.var(-1, correction=0).mean()), rel=1e-12)
        assert found[f"hidden_mean_square/{name}"] == pytest.approx(float(h.square().mean()), rel=1e-12)
        assert found[f"hidden_max/{name}"] == pytest.approx(float(h.abs().max()), rel=1e-12)
        ratios = [float(one[i].abs().max() / r.median_abs(one[i])) for one in hidden]
        assert found[f"massive_ratio/{name}"] == pytest.approx(max(ratios), rel=1e-12)
        rows = h.flatten(0, 1)
        assert found[f"hidden_rank/{name}"] == pytest.approx(float(effective_rank(rows)), rel=1e-9)
        assert found[f"hidden_nuclear_norm/{name}"] == pytest.approx(float(nuclear_norm(rows)), rel=1e-9)
        magnitudes = h.abs().mean((0, 1))
        assert found[f"residual_sink/{name}"] == pytest.approx(float(magnitudes.max() / magnitudes.sum()), rel=1e-12)
    magnitudes = both.abs().mean((0, 1, 2))
    assert found["residual_sink/all"] == pytest.approx(float(magnitudes.max() / magnitudes.sum()), rel=1e-12)
    for n in range(DEPTH):
        assert found[f"angular_distance/blocks.{n}"] == pytest.approx(float(r.angular_distance(both)[n]), abs=1e-8)
        assert found[f"block_influence/blocks.{n}"] == pytest.approx(float(r.block_influence(both)[n]), abs=1e-12)


def test_the_matrix_has_all_pairs_and_the_last_tokens_where_told():
    task, given = gpt(), batches()
    both = torch.cat([torch.stack(states(task, batch)) for batch in given], dim=1)
    for tokens in ("all", "last"):
        seen = inspect(task, given, tokens=tokens, deletion=False)
        assert seen.layers == ["embed", *(f"blocks.{n}" for n in range(DEPTH))]
        for n in range(1, DEPTH + 1):
            expected = r.angular_distance(both, n, tokens=tokens).tolist()
            assert seen.distances.diagonal(n).tolist() == pytest.approx(expected, abs=1e-8)
    assert not any(name.startswith("deletion_drop") for name in seen.means)


def test_a_deleted_block_is_one_that_the_network_does_not_have():
    task, given = gpt(), batches()
    found = look(task, given)

    def value():
        with torch.no_grad():
            return float(torch.stack([loss(task.model, batch) for batch in given]).mean())

    task.model.eval()
    whole, modules = value(), list(task.model.blocks)
    for n in range(DEPTH):
        task.model.blocks = nn.ModuleList(block for i, block in enumerate(modules) if i != n)
        assert found[f"deletion_drop/blocks.{n}"] == pytest.approx(value() - whole, rel=1e-9)
        assert found[f"deletion_drop/blocks.{n}"] != 0


def test_attention_and_logits_are_those_of_the_pass():
    task, given = gpt(), batches(1)
    found = look(task, given)
    attn, x = task.model.blocks[0].attn, states(task, given[0])[0]
    with torch.no_grad():
        q, k, _ = attn.f.qkv(attn.pre(x)).view(3, LENGTH, 6, WIDTH // 2).transpose(1, 2).split(2, dim=1)
        logits = task.model(given[0][0])
    weights = attention_logits(q, k, causal=True).softmax(-1)
    entropy = attention_entropy(weights)
    assert found["attention_entropy/blocks.0"] == pytest.approx(float(entropy.mean()), rel=1e-9)
    assert found["attention_entropy_min/blocks.0"] == pytest.approx(float(entropy.min()), rel=1e-9)
    assert found["attention_sink/blocks.0"] == pytest.approx(float(weights[:, :, 1:, 0].mean()), rel=1e-9)
    products = (q @ k.mT / (WIDTH // 2) ** 0.5).tril().abs()
    assert found["attention_logit/blocks.0"] == pytest.approx(float(products.max()), rel=1e-9)
    assert found["logit_rms"] == pytest.approx(float(logits.square().mean().sqrt()), rel=1e-9)
    assert found["logit_max"] == pytest.approx(float(logits.abs().max()), rel=1e-9)


def test_looking_leaves_no_trace():
    task = gpt(dropout=0.3)
    task.model.train()
    task.model.blocks[1].eval()
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    modes = [module.training for module in task.model.modules()]
    torch.manual_seed(3)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    first, second = look(task, batches()), look(task, batches())
    assert first == second
    assert torch.equal(torch.rand(3), drawn)
    assert [module.training for module in task.model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert not any(module._forward_hooks or "forward" in vars(module) for module in task.model.modules())


def test_an_error_leaves_no_trace_either():
    task = gpt()
    with pytest.raises(ValueError, match="reads at most"):
        look(task, [(torch.zeros(1, LENGTH + 1, dtype=torch.long),) * 2])
    assert not any(module._forward_hooks or "forward" in vars(module) for module in task.model.modules())
    with pytest.raises(ValueError, match="at least one batch"):
        look(task, [])


@pytest.mark.parametrize("placement", [Hyper, ResidualDual])
def test_several_streams_are_one_hidden_state(placement):
    task, given = gpt(placement), batches(1)
    found, flow = look(task, given), states(task, given[0])
    for i, name in enumerate(["embed", "blocks.0", "blocks.1", "blocks.2"]):
        h = flow[i].mean(-2) if placement is Hyper else torch.cat(flow[i], dim=-1)
        assert found[f"hidden_max/{name}"] == pytest.approx(float(h.abs().max()), rel=1e-12)
        assert all(math.isfinite(found[f"{measure}/{name}"]) for measure in MEASURES)
    assert all(math.isfinite(found[f"deletion_drop/blocks.{n}"]) for n in range(DEPTH))


def test_features_and_images_have_tokens_of_their_own():
    assert hidden_state(torch.zeros(2, 5)).shape == (2, 1, 5)
    image = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    assert hidden_state(image).shape == (2, 16, 3)
    assert torch.equal(hidden_state(image)[1, 6], image[1, :, 1, 2])


def test_a_network_without_attention_has_the_rest():
    torch.manual_seed(0)
    model = ResidualMLP((1, 4, 4), 3, Pre(LayerNorm), depth=2, width=8, hidden=8)
    found = look(SimpleNamespace(model=model, loss=loss), [(torch.randn(20, 1, 4, 4), torch.arange(20) % 3)])
    assert all(f"{measure}/blocks.1" in found for measure in (*MEASURES, "deletion_drop", "angular_distance"))
    assert not any(name.startswith("attention") for name in found)


def test_blocks_that_change_the_shape_are_not_compared_and_that_is_said():
    torch.manual_seed(0)
    model = ConvNet((1, 8, 8), 3, BatchNorm, depth=3, width=4)
    task = SimpleNamespace(model=model, loss=loss)
    seen = inspect(task, [(torch.randn(5, 1, 8, 8), torch.arange(5) % 3)])
    assert seen.distances is None
    assert {f"hidden_variance/blocks.{n}" for n in range(3)} <= set(seen.means)
    assert not any(name.startswith(("deletion_drop", "angular_distance", "residual_sink/all")) for name in seen.means)
    (line,) = seen.left_out
    assert line.startswith("blocks.0, blocks.1, blocks.2 change the shape")


def test_a_network_without_blocks_has_its_logits():
    model = nn.Linear(4, 3)
    seen = inspect(SimpleNamespace(model=model, loss=loss), [(torch.randn(5, 4), torch.arange(5) % 3)])
    assert blocks(model) == {}
    assert set(seen.means) == {"logit_rms"}
    assert "no `blocks`" in seen.left_out[0]


def test_a_block_comes_back_after_an_error():
    block = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    expected = block(x)
    with without(block):
        assert block(x) is x
    with pytest.raises(ZeroDivisionError), without(block):
        _ = 1 / 0
    assert torch.equal(block(x), expected)


def test_only_the_last_pass_is_recorded():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Identity(), nn.Linear(4, 4)])
    with Recording(model) as recording:
        for value in (1.0, 2.0):
            model.blocks[1](model.blocks[0](torch.full((1, 4), value)))
    assert list(recording.states) == ["embed", "blocks.0", "blocks.1"]
    assert recording.states["embed"].unique().tolist() == [2.0]
    assert recording.alike == ["blocks.0", "blocks.1"]
