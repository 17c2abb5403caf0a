"""Pre-LN, Pre-RMSNorm and Pre-CRMSNorm are one function; what is no Pre-LN is refused in one sentence."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn

from tests.surgery.models import MODELS, build
from trainkit.norm.deepnorm import DeepNorm
from trainkit.norm.fixup import Fixup
from trainkit.norm.hybrid import Hybrid
from trainkit.norm.hyper import Hyper
from trainkit.norm.inverse_depth import InverseDepth
from trainkit.norm.keel import Keel
from trainkit.norm.lns import LNS
from trainkit.norm.mix import Mix
from trainkit.norm.ngpt import NGPT
from trainkit.norm.output import Output
from trainkit.norm.peri import Peri
from trainkit.norm.placement import Residual
from trainkit.norm.post import Post
from trainkit.norm.pre import Pre
from trainkit.norm.residual_dual import ResidualDual
from trainkit.norm.rezero import ReZero
from trainkit.norm.sandwich import Sandwich
from trainkit.norm.skipinit import SkipInit
from trainkit.norm_layer.crms import CRMSNorm
from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.rms import RMSNorm
from trainkit.surgery import to_pre_crms, to_pre_rms

FORMS = {"rms": (to_pre_rms, RMSNorm), "crms": (to_pre_crms, CRMSNorm)}


def streams(model, inputs):
    """The residual stream before each sublayer."""
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for module in model.modules()
        if isinstance(module, Residual)
    ]
    model(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def norms_of_stream(model):
    return [model.after] + [module.pre for module in model.modules() if isinstance(module, Residual)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_outputs_agree(name, form):
    convert, kind = FORMS[form]
    model, inputs = build(name)
    before = deepcopy(model.state_dict())
    twin = convert(model)
    torch.testing.assert_close(twin(inputs), model(inputs), rtol=0, atol=1e-8)
    assert all(type(norm) is kind for norm in norms_of_stream(twin))
    assert all(type(norm) is LayerNorm for norm in norms_of_stream(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("placement", [LNS, partial(SkipInit, init=0.7), partial(Mix, alpha=0.0)])
@torch.no_grad()
def test_what_is_pre_ln_with_constants_is_converted_too(placement):
    model, inputs = build("gpt", placement)
    for convert, _ in FORMS.values():
        torch.testing.assert_close(convert(model)(inputs), model(inputs), rtol=0, atol=1e-8)


@torch.no_grad()
def test_a_layer_norm_without_bias_makes_no_biases():
    model, inputs = build("gpt", layer=partial(LayerNorm, bias=False))
    twin = to_pre_rms(model)
    torch.testing.assert_close(twin(inputs), model(inputs), rtol=0, atol=1e-8)
    assert not any(name.endswith("bias") for name, _ in twin.named_parameters())


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_stream_is_centred_and_then_stored_without_its_last_channel(name):
    model, inputs = build(name)
    full, short = streams(to_pre_rms(model), inputs), streams(to_pre_crms(model), inputs)
    assert max(h.mean(-1).abs().max() for h in streams(model, inputs)) > 0.01
    for h, compressed in zip(full, short, strict=True):
        assert h.mean(-1).abs().max() < 1e-13
        assert compressed.shape[-1] == h.shape[-1] - 1
        torch.testing.assert_close(compressed, h[..., :-1], rtol=0, atol=1e-12)


def test_a_tied_head_is_untied_and_the_twin_trains():
    model, inputs = build("gpt")
    for convert, _ in FORMS.values():
        twin = convert(model)
        assert twin.head.weight is not twin.embed.weight
        assert twin.head.role == "head"
        twin(inputs).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters())
    assert model.head.weight is model.embed.weight


def test_dtype_mode_and_frozen_parameters_stay():
    model, _ = build("vit")
    model = model.float().eval()
    model.embed.weight.requires_grad_(False)
    twin = to_pre_rms(model)
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert not any(module.training for module in twin.modules())
    assert [name for name, p in twin.named_parameters() if not p.requires_grad] == ["embed.weight"]


REFUSED = {
    Post: "normalizes its sum",
    Peri: "stands between the embedding and the stream",
    Sandwich: "normalizes its output",
    Output: "normalizes its output",
    partial(Mix, alpha=0.5): "normalizes its sum",
    DeepNorm: "normalizes its sum",
    Keel: "normalizes its sum",
    Hybrid: "no norm on its input",
    ResidualDual: "between the embedding and the stream",
    Hyper: "between the embedding and the stream",
    ReZero: "no norm on its input",
    InverseDepth: "no norm on its input",
    NGPT: "is Approach",
}


@pytest.mark.parametrize(("placement", "says"), REFUSED.items(), ids=str)
def test_other_placements_are_refused(placement, says):
    model, _ = build("gpt", placement)
    for convert, _ in FORMS.values():
        with pytest.raises(ValueError, match=f"needs Pre-LN.*{says}.*norm=pre"):
            convert(model)


def test_other_norm_layers_are_refused():
    for placement, layer, found in ((Pre, RMSNorm, "RMSNorm"), (Fixup, LayerNorm, "Bias")):
        with pytest.raises(ValueError, match=f"starts from LayerNorm; .* is {found}"):
            to_pre_rms(build("gpt", placement, layer)[0])


@pytest.mark.parametrize("name", ["gpt", "mlp"])
def test_dropout_on_the_stream_is_refused(name):
    with pytest.raises(ValueError, match=r"has dropout 0\.1\. Convert with model\.dropout=0"):
        to_pre_rms(build(name, dropout=0.1)[0])


def test_shared_weights_are_refused():
    model, _ = build("gpt")
    model.blocks[1].mlp.f.inp.weight = model.blocks[0].mlp.f.inp.weight
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.f\.inp\.weight and blocks\.0\.mlp\.f\.inp\.weight"):
        to_pre_rms(model)


def test_a_sublayer_that_does_not_say_what_it_writes_is_refused():
    model, _ = build("gpt")
    del model.blocks[1].attn.f.out.writes_stream
    with pytest.raises(ValueError, match=r"marked writes_stream.*blocks\.1\.attn\.f has 2 and 0"):
        to_pre_rms(model)


def test_features_of_another_kind_are_refused():
    model, _ = build("gpt")
    model.extra = nn.Conv1d(12, 12, 1)
    with pytest.raises(ValueError, match=r"extra\.weight of Conv1d is something else"):
        to_pre_rms(model)


def test_something_else_than_a_residual_model_is_refused():
    with pytest.raises(ValueError, match="Linear has no before"):
        to_pre_rms(nn.Linear(3, 3))
