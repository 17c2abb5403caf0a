"""Batch-statistic norms folded into linear layers: eval without norms, the same numbers."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.surgery.models import build
from trainkit.norm.lns import LNS
from trainkit.norm.peri import Peri
from trainkit.norm.post import Post
from trainkit.norm.pre import Pre
from trainkit.norm_layer.batch import batch
from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.prep_batch import PRepBN
from trainkit.norm_layer.rep_batch import RepBN
from trainkit.norm_layer.unified import UnifiedNorm
from trainkit.surgery import fuse_norm

LAYERS = {
    "batch": partial(batch, count="call"),
    "rep_batch": partial(RepBN, count="call"),
    "prep_batch": partial(PRepBN, count="call", steps=4),
    "unified": partial(UnifiedNorm, count="call", warmup=2),
}


def trained(name: str, *, placement=Pre, layer: str, **knobs):
    """A model after a few training forwards, which move the statistics of its norms."""
    model, inputs = build(name, placement, LAYERS[layer], **knobs)
    start = {key: value.clone() for key, value in model.named_buffers() if "running" in key}
    for _ in range(3):
        model.train()(inputs).sum().backward()
    assert all(not torch.allclose(value, start[key]) for key, value in model.named_buffers() if key in start)
    return model, inputs


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ["gpt", "vit", "llama", "mlp"])
def test_outputs_agree_with_eval(name, layer):
    model, inputs = trained(name, layer=layer)
    expected = model.eval()(inputs)
    model.train()
    fused = fuse_norm(model)
    torch.testing.assert_close(fused(inputs), expected, rtol=0, atol=1e-8)
    assert not fused.training
    assert model.training
    assert not any(hasattr(module, "scale_shift") for module in fused.modules())
    torch.testing.assert_close(model.eval()(inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gpt", "vit"])
def test_nothing_depends_on_the_batch_any_more(name):
    model, inputs = trained(name, layer="batch")
    fused = fuse_norm(model).train()
    torch.testing.assert_close(fused(inputs)[:1], fused(inputs[:1]), rtol=0, atol=1e-12)


def test_a_constant_after_the_norm_goes_with_it():
    model, inputs = trained("gpt", placement=LNS, layer="rep_batch")
    torch.testing.assert_close(fuse_norm(model)(inputs), model.eval()(inputs), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("placement", "knobs", "where"),
    [
        (Post, {}, r"blocks\.0\.attn\.post"),
        (Peri, {}, "before"),
        (Pre, {"qk_norm": "head"}, r"blocks\.0\.attn\.f\.k_norm"),
    ],
)
def test_a_norm_that_no_linear_layer_follows_is_refused(placement, knobs, where):
    model, _ = build("gpt", placement, LAYERS["batch"], **knobs)
    with pytest.raises(ValueError, match=f"linear layers that follow it directly; after {where} come others"):
        fuse_norm(model)


def test_a_norm_that_looks_at_its_input_in_eval_is_refused():
    for model in (build("gpt", Pre, LayerNorm)[0], nn.Linear(3, 3)):
        with pytest.raises(ValueError, match="fixed scale and shift in eval; the model has none"):
            fuse_norm(model)


def test_dropout_does_not_matter():
    model, inputs = build("gpt", Pre, LAYERS["batch"], dropout=0.3)
    torch.testing.assert_close(fuse_norm(model)(inputs), model.eval()(inputs), rtol=0, atol=1e-8)
