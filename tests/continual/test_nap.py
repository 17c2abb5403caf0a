"""NaP as a strategy: what it puts where, and what that does to weights, gradients and the effective learning rate."""

import math
from copy import deepcopy

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

import trainkit
from tests.menu import build
from trainkit.continual.nap import NaP
from trainkit.launch.compose import compose
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import check
from trainkit.measure.plasticity import effective_lr
from trainkit.model.parts.conv import ConvNorm
from trainkit.model.parts.mlp import FeedForward
from trainkit.norm_layer.batch import BatchNorm2d
from trainkit.norm_layer.group import GroupNorm
from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.rms import RMSNorm

FACTS = {"image": [1, 8, 8], "classes": 10, "vocab": 32, "bytes_per_token": 1.0}
SIZES = {
    "mlp": ["model.depth=2", "model.width=16", "model.hidden=24"],
    "vit": ["model.depth=1", "model.width=16", "model.heads=2"],
    "gpt": ["model.depth=1", "model.width=16", "model.heads=2", "model.context=8"],
    "llama": ["model.depth=1", "model.width=16", "model.hidden=24", "model.heads=2", "model.context=8"],
    "cnn": ["model.depth=2", "model.width=6"],
    "resnet18": ["model.width=4"],
}


def made(model, *words):
    """(the model after conversion, the projection), as a run builds them."""
    cfg = compose([f"model={model}", "continual=nap", *SIZES[model], *words])
    for name in FACTS.keys() & cfg.data.keys():
        OmegaConf.update(cfg, f"data.{name}", FACTS[name])
    torch.manual_seed(0)
    net, strategy, projection = (instantiate(cfg[g], _convert_="all") for g in ("model", "continual", "projection"))
    return strategy.convert(net), projection


def inputs(model, n=6):
    return (
        torch.randint(32, (n, 8))
        if model in ("gpt", "llama")
        else torch.randn(n, 1, 8, 8).to(torch.get_default_dtype())
    )


def hidden(net):
    """The layers that feed an activation."""
    parts = [m for m in net.modules() if isinstance(m, (FeedForward, ConvNorm))]
    return [m.inp if isinstance(m, FeedForward) else m.conv for m in parts]


def norms(net):
    parts = [m for m in net.modules() if isinstance(m, (FeedForward, ConvNorm))]
    return [m.hidden_norm if isinstance(m, FeedForward) else m.norm for m in parts]


def loss_of(net, x, y):
    out = net(x)
    return F.cross_entropy(out.flatten(0, -2), y.expand(8, -1).T.flatten() if out.dim() == 3 else y)


@pytest.mark.parametrize("model", SIZES)
def test_what_feeds_an_activation_is_normalized_and_scale_invariant(model):
    """cos(W, grad) = 0, and f(c W) = f(W), up to the norms' eps."""
    for words, kind in (([], LayerNorm), (["continual.norm=rms"], RMSNorm)):
        net, _ = made(model, *words)
        net = net.double()
        assert [type(norm) for norm in norms(net)] == [kind] * len(hidden(net))
        assert len(hidden(net)) == {"mlp": 2, "cnn": 2, "resnet18": 20}.get(model, 1)
        assert not [name for name, m in net.named_modules() if isinstance(m, BatchNorm2d)]
        for norm, layer in zip(norms(net), hidden(net), strict=True):
            assert layer.bias is None
            assert norm.axis == (1 if isinstance(layer, nn.Conv2d) else -1)
            assert norm.width == len(layer.weight)
            norm.eps = 1e-14
        x, y = inputs(model).to(torch.float64) if model not in ("gpt", "llama") else inputs(model), torch.arange(6)
        out = net(x)
        loss_of(net, x, y).backward()
        for layer in hidden(net):
            w, g = layer.weight.flatten(), layer.weight.grad.flatten()
            assert g.norm() > 0
            assert abs(w @ g) < 1e-9 * w.norm() * g.norm()
        head = net.head.weight
        assert abs(F.cosine_similarity(head.flatten(), head.grad.flatten(), dim=0)) > 1e-3
        with torch.no_grad():
            for i, layer in enumerate(hidden(net)):
                layer.weight.mul_(1.5 + i)
        torch.testing.assert_close(net(x), out, rtol=1e-9, atol=1e-9)


def test_equals_the_placement():
    """continual=nap puts into a Pre-LN transformer what norm=nap puts there."""
    converted, _ = made("gpt")
    placed = build("model", "model=gpt", "norm=nap", "data.vocab=32", *SIZES["gpt"])
    assert set(converted.state_dict()) <= set(placed.state_dict()) | {"position.weight"}
    placed.load_state_dict(converted.state_dict())
    x = inputs("gpt")
    assert torch.equal(placed(x), converted(x))


def test_norms_over_the_batch_are_replaced_and_others_stay():
    for name, kind in {"batch": LayerNorm, "none": LayerNorm, "dyt": LayerNorm, "rep_batch": LayerNorm,
                       "group": GroupNorm, "rms": RMSNorm}.items():  # fmt: skip
        groups = ["norm_layer.groups=2"] if name == "group" else []
        net, _ = made("cnn", f"norm_layer={name}", *groups)
        assert [type(norm) for norm in norms(net)] == [kind] * 2
        assert all(layer.bias is None for layer in hidden(net))
    net, _ = made("mlp", "norm_layer=batch")
    assert type(net.blocks[0].mlp.pre).__name__ == "BatchNorm"  # not before an activation
    assert type(net.blocks[0].mlp.f.hidden_norm) is LayerNorm


def test_gains_and_offsets():
    net, projection = made("cnn", "continual.affine=none")
    assert projection.affine == "none"
    assert not any(p.requires_grad for norm in norms(net) for p in norm.parameters())
    for word in ("joint", "to_init"):
        net, projection = made("cnn", f"continual.affine={word}")
        assert projection.affine == word
        assert all(p.requires_grad for norm in norms(net) for p in norm.parameters())
    _, projection = made("cnn", "continual.affine=joint", "projection.affine=none")
    assert projection.affine == "none"  # what is typed wins


def train(net, projection, steps, *, model, lr=0.3, adam=False):
    """On labels that have nothing to do with the images, redrawn every 50 steps."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01) if adam else torch.optim.SGD(net.parameters(), lr=lr)
    projection.prepare(optimizer)
    projection(net)
    x = inputs(model, 10)
    for step in range(steps):
        if step % 50 == 0:
            y = torch.randint(10, (len(x),))
        optimizer.zero_grad()
        (loss_of(net, x, y) + projection.penalty(net)).backward()
        optimizer.step()
        projection(net)
        yield [layer.weight.detach().double().norm() for layer in hidden(net)]


@pytest.mark.parametrize(("model", "affine", "adam"), [("mlp", "to_init", True), ("cnn", "joint", False)])
def test_norms_and_effective_learning_rates_stand_still_for_500_steps(model, affine, adam):
    net, projection = made(model, f"continual.affine={affine}")
    free = deepcopy(net)
    start = [layer.weight.detach().double().norm() for layer in hidden(net)]
    rates = [effective_lr(0.1, rho, scale_free=adam) for rho in start]
    others = {n: p.detach().double().norm() for n, p in projection.weights(net).items()}
    ended = start
    for ended in train(net, projection, 500, model=model, adam=adam):
        for rho, norm, rate in zip(start, ended, rates, strict=True):
            assert abs(norm / rho - 1) <= 1e-6
            assert math.isclose(effective_lr(0.1, norm, scale_free=adam), rate, rel_tol=2e-6)
    assert not torch.equal(hidden(net)[0].weight, hidden(free)[0].weight)
    assert set(others) == {n for n, p in net.named_parameters() if p.ndim > 1 and "head" not in n}
    for name, rho in others.items():
        assert abs(net.get_parameter(name).detach().double().norm() / rho - 1) <= 1e-6
    # Without the projection the norms grow, so the effective rate falls.
    idle = build("projection", "projection=nap", "projection.project_every=1000")
    *_, ended = train(free, idle, 200, model=model, adam=adam)
    for norm, rate in zip(ended, rates, strict=True):
        assert effective_lr(0.1, norm, scale_free=adam) < 0.99 * rate


def test_a_converted_model_loads_its_own_state():
    net, _ = made("cnn")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    again, _ = made("cnn")
    again.load_state_dict(net.state_dict())
    x = inputs("cnn")
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("model", SIZES)
def test_a_run_of_three_steps(model, tmp_path):
    folders = [f"paths.log_dir={tmp_path / 'logs'}", f"paths.cache_dir={tmp_path / 'cache'}"]
    data = ["data.batch_size=8"]
    if model in ("gpt", "llama"):
        (tmp_path / "corpus.txt").write_text("".join(f"line {i}: {i * i} lazy dogs\n" for i in range(400)))
        data += ["data=text", f"data.path={tmp_path / 'corpus.txt'}", "data.val_batches=1", "data.test_batches=1"]
    words = [f"model={model}", "continual=nap", *SIZES[model], *data, *folders, "logger=none", "trainer.max_steps=3"]
    result = trainkit.run([*words, "trainer.threads=1"])
    assert result.status == "finished"
    saved = torch.load(result.dir / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["projection"]["state"]["step"] == 3
    for name, rho in saved["projection"]["state"]["norms"].items():
        norm = saved["state_dict"][f"model.{name}"].double().norm()
        assert rho == 0 or abs(norm / rho - 1) <= 1e-6, name


def test_bad_input():
    with pytest.raises(ValueError, match=r"continual.norm is layer or rms, a norm over features; got 'batch'"):
        NaP(norm="batch")
    with pytest.raises(ValueError, match=r"continual.affine is none, joint or to_init; got 'decay'"):
        NaP(affine="decay")
    with pytest.raises(
        ValueError, match="continual=nap needs layers that say what feeds their activations; Sequential"
    ):
        NaP().convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    with pytest.raises(UserError, match="continual=nap cannot work without projection=nap"):
        check(["model=cnn", "continual=nap", "projection=none"])
    with pytest.raises(UserError, match="brings projection="):
        check(["model=gpt", "continual=nap", "norm=ngpt"])
