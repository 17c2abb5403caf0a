"""AGVM against the equations, with learning rates per module, and its place in training."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.callbacks.toy import Network, Toy, fit, rows
from trainkit.gradient.agvm import AGVM, by_depth
from trainkit.gradient.clip import Clip

MODULES = {"stem": ["embed"], "body": ["blocks"], "top": ["head.weight", "head.bias"]}
SETTINGS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1),
}


def network():
    torch.manual_seed(0)
    return Network().double()


def halves(model, step, noise=1.0):
    """Two gradients for every parameter: a common part and parts of their own."""
    generator = torch.Generator().manual_seed(step)
    drawn = [torch.randn(3, *p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()]
    return [d[0] + noise * d[1] for d in drawn], [d[0] + noise * d[2] for d in drawn]


def take(model, treatment, optimizer, step, a, b, share=0.5):
    """A step as a trainer takes it."""
    for p, x, y in zip(model.parameters(), a, b, strict=True):
        p.grad = share * x + (1 - share) * y
    if treatment.begin_step(step):
        treatment.first_half([x.clone() for x in a], share)
    values = treatment([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    return values


def prepared(model, kind="sgd", lr=0.05, **settings):
    treatment = AGVM(**{"interval": 1, "start": 1, "momentum": 0.5, "modules": MODULES} | settings)
    optimizer = SETTINGS[kind](model.parameters(), lr=lr)
    treatment.prepare(model, optimizer)
    return treatment, optimizer


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_formula(kind, share):
    """By hand: one param group per module, whose learning rate is multiplied around the step."""
    model, other = network(), network()
    treatment, optimizer = prepared(model, kind, interval=2, start=3, stop=8, momentum=0.6)
    modules = [list(other.embed.parameters()), list(other.blocks.parameters()), list(other.head.parameters())]
    by_hand = SETTINGS[kind]([{"params": m} for m in modules], lr=0.05)
    scales = [1.0, 1.0, 1.0]
    for step in range(1, 11):
        a, b = halves(model, step)
        take(model, treatment, optimizer, step, a, b, share)

        by_parameter = dict(zip(other.parameters(), zip(a, b, strict=True), strict=True))
        for p, (x, y) in by_parameter.items():
            p.grad = share * x + (1 - share) * y
        if 3 <= step <= 8 and step % 2 == 0:
            noise = []
            for m in modules:
                pair = []
                for half, part in ((0, share), (1, 1 - share)):
                    xs = [part * by_parameter[p][half] for p in m]
                    if kind == "adamw":
                        vs = [by_hand.state[p]["exp_avg_sq"] for p in m]
                        xs = [x / ((0.95 * v + 0.05 * x**2).sqrt() + 1e-6) for x, v in zip(xs, vs, strict=True)]
                    pair.append(torch.cat([x.flatten() for x in xs]))
                noise.append(1 - torch.cosine_similarity(*pair, dim=0).item())
            new = [min(max((noise[0] + 1e-6) / (n + 1e-6), 0.5), 10.0) ** 0.5 for n in noise]
            scales = [0.6 * s + 0.4 * f for s, f in zip(scales, new, strict=True)]
        for group, s in zip(by_hand.param_groups, scales, strict=True):
            group["lr"] = 0.05 * (s if 3 <= step <= 8 else 1.0)
        by_hand.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-13)
        assert treatment.scales.tolist() == pytest.approx(scales, rel=1e-9)
    assert scales[0] == 1.0
    assert 1.0 not in scales[1:]


def test_equal_halves_make_every_scale_one_and_leave_the_step_alone():
    model, other = network(), network()
    treatment, optimizer = prepared(model)
    alone = SETTINGS["sgd"](other.parameters(), lr=0.05)
    for step in range(1, 4):
        a, _ = halves(model, step)
        take(model, treatment, optimizer, step, a, a)
        for p, g in zip(other.parameters(), a, strict=True):
            p.grad = g
        alone.step()
    assert treatment.scales.tolist() == pytest.approx([1.0] * 3, abs=1e-8)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


def test_a_noisier_module_takes_smaller_steps():
    model = network()
    treatment, optimizer = prepared(model)
    for step in range(1, 4):
        a, b = halves(model, step, noise=0.5)
        noisy, _ = halves(model, 100 + step, noise=5.0)
        body = {id(p) for p in model.blocks.parameters()}
        a = [n if id(p) in body else x for p, n, x in zip(model.parameters(), noisy, a, strict=True)]
        values = take(model, treatment, optimizer, step, a, b)
    assert values["agvm/stem"] == 1.0
    assert values["agvm/body"] < 0.9
    assert values["agvm/top"] == pytest.approx(1.0, abs=0.3)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zero_gradients_give_no_nan_and_non_finite_ones_spoil_no_scale(kind, value):
    model = network()
    treatment, optimizer = prepared(model, kind, adam=kind == "adamw")
    bad = [torch.full_like(p, value) for p in model.parameters()]
    take(model, treatment, optimizer, 1, bad, bad)
    assert treatment.scales.isfinite().all()
    assert all(p.isfinite().all() == (value == 0) for p in model.parameters())


def test_where_all_scales_are_one_the_step_is_the_same_bits():
    """Before the first comparison, too, and the weights of the reference are not even touched."""
    model, other = network(), network()
    treatment, optimizer = prepared(model, "adamw", interval=100)
    alone = SETTINGS["adamw"](other.parameters(), lr=0.05)
    a, b = halves(model, 1)
    take(model, treatment, optimizer, 1, a, b)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        q.grad = p.grad
    alone.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_whole_gradient_is_clipped_in_its_steps():
    model = network()
    treatment, optimizer = prepared(model, max_norm=0.1, clip_steps=[2, 3])
    for step in range(1, 5):
        a, b = halves(model, step)
        values = take(model, treatment, optimizer, step, a, b)
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        assert (norm == pytest.approx(0.1, rel=1e-5)) == (step in (2, 3)) == ("grad_norm/clipped" in values)
    assert isinstance(treatment.clip, Clip)


def test_a_saved_state_gives_the_same_next_steps():
    model, again = network(), network()
    (treatment, optimizer), (resumed, other) = prepared(model), prepared(again)
    for step in (1, 2):
        take(model, treatment, optimizer, step, *halves(model, step))
    again.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for p in again.parameters():
        other.state[p]["momentum_buffer"] = other.state[p]["momentum_buffer"].clone()
    resumed.load_state_dict(treatment.state_dict())
    take(again, resumed, other, 3, *halves(model, 3))
    take(model, treatment, optimizer, 3, *halves(model, 3))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    resumed.modules = None
    with pytest.raises(ValueError, match="goes on with scales of 3 modules"):
        resumed.prepare(again, other)


# --- modules -----------------------------------------------------------------------------------------------------


def test_modules_are_what_comes_before_the_blocks_each_block_and_what_comes_behind():
    from trainkit.model.vit import ViT
    from trainkit.norm.pre import Pre
    from trainkit.norm_layer.layer import LayerNorm

    model = ViT((1, 8, 8), 10, Pre(LayerNorm), patch=4, depth=2, width=8, heads=2)
    modules = by_depth(model)
    assert list(modules) == ["embed", "blocks.0", "blocks.1", "head"]
    names = {id(p): name for name, p in model.named_parameters()}
    for module, parameters in modules.items():
        tops = {names[id(p)].split(".")[0] for p in parameters}
        expected = {"embed": {"class_token", "embed", "position"}, "head": {"after", "head"}}
        assert tops == expected.get(module, {"blocks"})
    assert sum(map(len, modules.values())) == len(names)
    plain = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    assert list(by_depth(plain)) == ["0", "1"]


@pytest.mark.parametrize(
    ("modules", "says"),
    [
        ({"stem": ["embed"], "body": ["blocks"]}, r"head\.weight is in none"),
        ({**MODULES, "again": ["blocks.0"]}, r"is in \['body', 'again'\]"),
        ({**MODULES, "neck": ["fpn"]}, r"no parameter begins as neck says, \['fpn'\]"),
    ],
)
def test_modules_must_name_every_parameter_once(modules, says):
    with pytest.raises(ValueError, match=says):
        prepared(network(), modules=modules)


@pytest.mark.parametrize(
    "bad", [{"interval": 0}, {"momentum": 1.0}, {"stop": 0}, {"clip_steps": [3, 1]}, {"max_norm": 0.0}]
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=rf"gradient\.{next(iter(bad))}"):
        AGVM(start=1, **bad)


def test_adam_without_an_adam_is_refused():
    model = network()
    treatment, optimizer = prepared(model, "sgd", adam=True)
    with pytest.raises(ValueError, match=r"gradient\.adam=true needs an optimizer with betas"):
        take(model, treatment, optimizer, 1, *halves(model, 1))


# --- in training -------------------------------------------------------------------------------------------------


class Spy(AGVM):
    """Notes the halves that it is handed, and the gradient."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.handed = []

    def __call__(self, gradients):
        if self._half is not None:
            first, share = self._half
            self.handed.append((self.step, share, torch.cat([g.flatten() for g in first])))
        return super().__call__(gradients)


@pytest.mark.parametrize("batches", [2, 3])
def test_halves_are_the_first_micro_batches(tmp_path, batches):
    """Against the gradient of these batches, at the weights that the step begins with."""
    treatment = Spy(interval=2, start=2, momentum=0.5)
    task = Toy(optimizer=partial(torch.optim.SGD, lr=0.01), gradient=treatment)
    task.model.double()
    task.loss = lambda model, batch: (model.eval()(batch.double()).squeeze(-1) - batch.sum(-1)).square().mean()
    expected = []
    begin_step = treatment.begin_step

    def noting(step):
        wanted = begin_step(step)
        if wanted:
            drawn = [
                torch.randn(8, 4, generator=torch.Generator().manual_seed((step - 1) * batches + i))
                for i in range(batches // 2)
            ]
            loss = sum(task.loss(task.model, batch) for batch in drawn) / len(drawn)
            gradients = torch.autograd.grad(loss, list(task.model.parameters()))
            expected.append(torch.cat([g.flatten() for g in gradients]))
        return wanted

    treatment.begin_step = noting
    fit(tmp_path, [], task=task, max_steps=5, accumulate_grad_batches=batches)
    assert [step for step, *_ in treatment.handed] == [2, 4]
    for (_, share, half), e in zip(treatment.handed, expected, strict=True):
        assert share == (batches // 2) / batches
        torch.testing.assert_close(half, e, rtol=1e-9, atol=1e-12)
    assert {"agvm/embed", "agvm/blocks.0", "agvm/blocks.1", "agvm/head"} <= rows(tmp_path)[1].keys()
    assert "agvm/embed" not in rows(tmp_path)[0]


def test_a_batch_in_one_piece_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Try trainer\.accumulate_grad_batches=2, or trainer=ddp"):
        fit(tmp_path, [], task=Toy(gradient=AGVM()))


def test_a_scaled_loss_changes_no_half(tmp_path):
    """Micro-batches leave gradients of the scaled loss behind, the whole one is unscaled."""
    from lightning.pytorch.plugins import MixedPrecision

    found = []
    for scale in (None, 64.0):
        treatment = Spy(interval=1, start=1)
        task = Toy(optimizer=partial(torch.optim.SGD, lr=1e-9), gradient=treatment)
        plugins = [] if scale is None else [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale))]
        options = {"precision": None} if plugins else {}
        fit(tmp_path / str(scale), [], task=task, max_steps=1, accumulate_grad_batches=2, plugins=plugins, **options)
        found.append(treatment.handed[0][2])
    assert found[1].norm().item() == pytest.approx(found[0].norm().item(), rel=0.05)
