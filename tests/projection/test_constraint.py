"""What all spectral constraints share: which weights, in which units, when, in which precision."""

from copy import deepcopy
from math import sqrt

import pytest
import torch
from torch import nn

from tests.menu import build
from trainkit.projection.hard_cap import HardCap
from trainkit.projection.soft_cap import SoftCap
from trainkit.projection.spectral import orthogonalize
from trainkit.projection.spectral_decay import SpectralDecay
from trainkit.projection.spectral_hammer import SpectralHammer
from trainkit.projection.spectral_normalize import SpectralNormalize
from trainkit.projection.svd_clip import SVDClip

from .toy import WIDTH, Net, muon, top, train

CONSTRAINTS = {
    "soft_cap": SoftCap,
    "hard_cap": HardCap,
    "svd_clip": SVDClip,
    "spectral_normalize": SpectralNormalize,
    "spectral_hammer": SpectralHammer,
    "spectral_decay": SpectralDecay,
}
NAMES = pytest.mark.parametrize("name", CONSTRAINTS)
pytestmark = pytest.mark.usefixtures("float64")


def settings(name, **changed):
    """That make a call outside of training do something."""
    return {**({"alpha": 0.1} if name == "soft_cap" else {}), "start": "keep", **changed}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def enlarge(model, factor=3.0):
    with torch.no_grad():
        for p in model.parameters():
            p *= factor
    return model


@NAMES
def test_the_menu_offers_the_defaults_of_the_class(name):
    ours, menu = vars(CONSTRAINTS[name]()), vars(build("projection", f"projection={name}"))
    assert ours == menu


@NAMES
def test_each_matrix_is_mapped_in_its_own_units_whatever_its_batch(name):
    projection, model = CONSTRAINTS[name](**settings(name, w_max=1.5) if name != "spectral_decay" else {}), Net()
    enlarge(model)
    before = [p.detach().clone() for p in model.matrices()]
    projection(model)
    assert all(torch.equal(p, b) for p, b in zip(model.matrices(), before, strict=True))  # start=keep
    projection(model)
    for p, b in zip(model.matrices(), before, strict=True):
        c = sqrt(p.shape[0] / p.shape[1])
        unit = c * 1.5 if name in ("soft_cap", "hard_cap", "spectral_normalize") else c
        expected = unit * projection.constrain((b / unit).unsqueeze(0), 1.0, None)[0]
        torch.testing.assert_close(p.detach(), expected, rtol=1e-11, atol=1e-12)
        assert not torch.equal(p, b)


@NAMES
def test_what_is_not_a_matrix(name):
    model = nn.ModuleDict(
        {
            "net": Net(),
            "patches": nn.Linear(5, WIDTH),
            "conv": nn.Conv2d(2, 3, 3),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "norm": nn.LayerNorm(4),
        }
    )
    model["patches"].role = "embed"
    enlarge(model, 10.0)
    before = snapshot(model)
    projection = CONSTRAINTS[name](**settings(name, rms_max=0.5))
    projection(model)
    projection(model)
    for key, p in model.named_parameters():
        axis = {"net.embed.weight": 1, "net.head.weight": 1, "patches.weight": 0}.get(key)
        if axis is not None:
            rms = before[key].square().mean(axis, keepdim=True).sqrt()
            assert (rms > 0.5).any()
            torch.testing.assert_close(p.detach(), before[key] / (rms / 0.5).clamp(min=1))
        elif not key.startswith("net.layers") or key.endswith("bias"):
            assert torch.equal(p, before[key]), key
    untouched = deepcopy(before)
    for p, value in zip(model.parameters(), untouched.values(), strict=True):
        p.data.copy_(value)
    projection.rms_max = None
    projection(model)
    assert torch.equal(model["net"].embed.weight, before["net.embed.weight"])


@NAMES
def test_a_tied_head_is_an_embedding(name):
    model = Net()
    model.head.weight = model.embed.weight
    projection = CONSTRAINTS[name](**settings(name))
    with torch.no_grad():
        model.embed.weight.mul_(10)
    projection(model)
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight.square().mean(1).sqrt().max().detach(), torch.tensor(1.0))


@NAMES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    model = enlarge(Net()).to(dtype)
    wide = deepcopy(model).float()
    for m in (model, wide):
        projection = CONSTRAINTS[name](**settings(name))
        projection(m)
        projection(m)
    for p, q in zip(model.parameters(), wide.parameters(), strict=True):
        assert p.dtype == dtype
        assert torch.equal(p, q.to(dtype))


@NAMES
def test_zero_matrices_stay_zero_and_gradients_are_left(name):
    model = Net()
    for p in model.parameters():
        p.data.zero_()
        p.grad = torch.ones_like(p)
    projection = CONSTRAINTS[name](**settings(name))
    projection(model)
    projection(model)
    for p in model.parameters():
        assert torch.equal(p, torch.zeros_like(p))
        assert torch.equal(p.grad, torch.ones_like(p))


@pytest.mark.parametrize("name", [name for name in CONSTRAINTS if name != "spectral_decay"])
def test_starts(name):
    bound = 0.4
    for start in ("clip", "orthogonal", "keep"):
        projection, model = CONSTRAINTS[name](start=start, w_max=bound), enlarge(Net())
        before = [p.detach().clone() for p in model.matrices()]
        projection(model)
        for p, b in zip(model.matrices(), before, strict=True):
            c = sqrt(p.shape[0] / p.shape[1])
            if start == "keep":
                assert torch.equal(p, b)
            elif start == "orthogonal":
                torch.testing.assert_close(p.detach(), bound * c * orthogonalize(b))
                values = torch.linalg.svdvals(p.detach() / c)
                assert 0.99 * bound < values.median() <= values.max() < bound
            else:
                assert top(p) <= bound * (1 + 1e-12) < top(b)
                u, s, vh = torch.linalg.svd(b, full_matrices=False)
                torch.testing.assert_close(p.detach(), (u * s.clamp(max=bound * c)) @ vh)


@NAMES
def test_a_resumed_run_is_the_unbroken_one(name):
    def run(steps, model, optimizer, projection):
        for _ in train(model, optimizer, projection, steps):
            pass

    torch.manual_seed(3)
    model = Net()
    again = deepcopy(model)
    optimizer, projection = muon(model, lr=0.1), CONSTRAINTS[name]()
    stream = train(model, optimizer, projection, 6)
    for _ in range(6):
        next(stream)
    saved = deepcopy((model.state_dict(), optimizer.state_dict(), projection.state_dict()))
    resumed, follower = muon(again, lr=0.1), CONSTRAINTS[name]()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    follower.load_state_dict(saved[2])
    follower.prepare(resumed)
    follower(again)  # the call before training
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), saved[0].values(), strict=True))
    for m, o, f in ((model, optimizer, projection), (again, resumed, follower)):
        for p in m.parameters():
            p.grad = torch.full_like(p, 0.1)
        o.step()
        f(m)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


@NAMES
def test_bad_input(name):
    make = CONSTRAINTS[name]
    with pytest.raises(ValueError, match=r"projection.start is clip, orthogonal or keep; got 'here'"):
        make(start="here")
    with pytest.raises(ValueError, match=r"projection.rms_max is a bound, above 0; got 0"):
        make(rms_max=0.0)
    if name != "spectral_decay":
        with pytest.raises(ValueError, match=r"projection.w_max is a bound, above 0; got -1"):
            make(w_max=-1)
    if name in ("spectral_normalize", "spectral_hammer", "spectral_decay"):
        with pytest.raises(ValueError, match=r"projection.iterations must be at least 1; got 0"):
            make(iterations=0)
    only_a_head = nn.Linear(3, 3)
    only_a_head.role = "head"
    with pytest.raises(ValueError, match=f"projection={name} needs linear layers beside embeddings and head"):
        make()(only_a_head)
