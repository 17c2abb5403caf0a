"""NaP: norms are kept, functions too where a norm follows, and nothing else is touched."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.menu import build
from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.rms import RMSNorm
from trainkit.projection.nap import NaP

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Everything but the head is followed by a norm."""

    def __init__(self, norm=LayerNorm, eps=1e-14):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, bias=False)
        self.inner = nn.ModuleList(nn.Linear(*sizes, bias=False) for sizes in ((16, 6), (6, 6)))
        self.norms = nn.ModuleList(norm(width, eps=eps) for width in (16, 6, 6))
        self.head = nn.Linear(6, 3)
        self.head.role = "head"

    def forward(self, x):
        x = F.relu(self.norms[0](self.conv(x).flatten(1)))
        for linear, norm in zip(self.inner, self.norms[1:], strict=True):
            x = F.relu(norm(linear(x)))
        return self.head(x)

    def hidden(self):
        return [self.conv.weight, *(linear.weight for linear in self.inner)]


def train(model, projection, *, steps, optimizer=None, seed=1):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.05)
    projection.prepare(optimizer)
    projection(model)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(8, 1, 4, 4, generator=generator), torch.randint(3, (8,), generator=generator)
        optimizer.zero_grad()
        (F.cross_entropy(model(x), y) + projection.penalty(model)).backward()
        optimizer.step()
        yield optimizer
        projection(model)


def test_the_menu_offers_the_defaults_of_the_class():
    assert vars(NaP()) == vars(build("projection", "projection=nap"))


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_norms_functions_and_optimizer_state_are_kept(norm):
    model, projection, probe = Net(norm), NaP(affine="none"), torch.randn(5, 1, 4, 4)
    first = [p.detach().norm() for p in model.hidden()]
    head = model.head.weight.detach().norm()
    for optimizer in train(model, projection, steps=10):
        moved = [p.detach().clone() for p in model.hidden()]
        assert all(abs(p.norm() - rho) > 1e-4 for p, rho in zip(moved, first, strict=True))
        state, outputs = deepcopy(optimizer.state_dict()["state"]), model(probe)
        projection.project(model)
        for p, before, rho in zip(model.hidden(), moved, first, strict=True):
            assert abs(p.norm() - rho) <= 1e-12 * rho
            torch.testing.assert_close(p.detach(), before * rho / before.norm(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(model(probe), outputs, rtol=1e-7, atol=1e-8)
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(state[i][k], after[i][k]) for i in state for k in state[i])
    assert abs(model.head.weight.norm() - head) > 1e-3


def test_gradients_are_orthogonal_to_what_is_projected():
    model = Net()
    F.cross_entropy(model(torch.randn(8, 1, 4, 4)), torch.randint(3, (8,))).backward()
    for p in model.hidden():
        assert abs(F.cosine_similarity(p.flatten(), p.grad.flatten(), dim=0)) < 1e-6
    assert abs(F.cosine_similarity(model.head.weight.flatten(), model.head.weight.grad.flatten(), dim=0)) > 1e-3


def test_project_every_counts_steps():
    model, projection = Net(), NaP(project_every=3)
    norms: list[int] = []
    projection(model)
    for _ in range(7):
        with torch.no_grad():
            model.conv.weight *= 2
        norms.append(round(float(model.conv.weight.detach().norm() / projection.norms["conv.weight"])))
        projection(model)
    assert norms == [2, 4, 8, 2, 4, 8, 2]


def test_project_output():
    model = Net()
    model.head.weight.data.mul_(3)
    for output in (False, True):
        projection = NaP(project_output=output)
        projection(model)
        assert ("head.weight" in projection.norms) == output
        before = model.head.weight.detach().clone()
        model.head.weight.data.mul_(2)
        projection(model)
        torch.testing.assert_close(model.head.weight.detach(), before * (1 if output else 2))
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
    tied["head"].role, tied["head"].weight = "head", tied["embed"].weight
    projection = NaP()
    projection(tied)
    assert set(projection.norms) == {"inner.weight"}


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_joint_rescaling_of_gains_and_offsets(norm):
    model, projection = Net(norm), NaP(affine="joint")
    projection(model)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    before = [{k: v.detach().clone() for k, v in layer.named_parameters()} for layer in model.norms]
    projection(model)
    for layer, old in zip(model.norms, before, strict=True):
        square = sum(v.square().sum() for v in old.values())
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.detach(), old[name] * (len(p) / square).sqrt(), rtol=1e-13, atol=1e-15)
    assert projection.penalty(model) == 0.0


def test_penalty_pulls_gains_and_offsets_to_their_start():
    model, projection = Net(), NaP(affine="to_init", reg_to_init=0.3)
    assert projection.penalty(model).item() == 0
    for p in model.norms.parameters():
        p.data += torch.randn_like(p)
    model.norms[0].requires_grad_(False)
    value = projection.penalty(model)
    gains = [layer.gain - 1 for layer in model.norms[1:]]
    offsets = [layer.bias for layer in model.norms[1:]]
    torch.testing.assert_close(value, 0.3 * sum(t.square().sum() for t in [*gains, *offsets]))
    value.backward()
    torch.testing.assert_close(model.norms[1].gain.grad, 0.6 * gains[0].detach())
    assert model.head.weight.grad is None
    projection(model)
    before = [p.detach().clone() for p in model.norms.parameters()]
    projection(model)
    assert all(torch.equal(p, b) for p, b in zip(model.norms.parameters(), before, strict=True))
    assert NaP(affine="none").penalty(model) == 0.0
    assert NaP().penalty(nn.Linear(2, 2)) == 0.0


def test_zeros_at_the_start_stay_free_and_later_zeros_stay_zero():
    model, projection = Net(), NaP()
    model.inner[0].weight.data.zero_()
    projection(model)
    model.inner[0].weight.data.fill_(2)
    model.inner[1].weight.data.zero_()
    projection(model)
    assert torch.equal(model.inner[0].weight, torch.full((6, 16), 2.0))
    assert torch.equal(model.inner[1].weight, torch.zeros(6, 6))


def test_frozen_weights_keep_their_bits_and_their_norm_once_they_are_trained():
    model, projection = Net(), NaP()
    model.inner[0].requires_grad_(False)
    projection(model)
    before = model.inner[0].weight.detach().clone()
    model.inner[0].weight.data.mul_(2)
    projection(model)
    assert torch.equal(model.inner[0].weight, 2 * before)
    model.inner[0].requires_grad_(True)
    projection(model)
    torch.testing.assert_close(model.inner[0].weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, projection = nn.Linear(300, 300, bias=False, dtype=dtype), NaP()
    with torch.no_grad():
        model.weight.fill_(300.0 if dtype == torch.float16 else 0.01)  # 300² · 300² overflows in float16
    projection(model)
    start = float(model.weight.detach().double().norm())
    torch.testing.assert_close(float(projection.norms["weight"]), start, rtol=1e-5, atol=0)
    before = (model.weight.detach().double() * 1.03).to(dtype)
    model.weight.data.copy_(before)
    projection(model)
    expected = before.double() * (start / before.double().norm())
    torch.testing.assert_close(model.weight.detach(), expected.to(dtype), rtol=8e-3, atol=0)
    assert model.weight.dtype == dtype


def test_a_resumed_run_keeps_the_norms_of_the_start():
    model, projection = Net(), NaP(project_every=2)
    *_, optimizer = train(model, projection, steps=5)
    torch.manual_seed(2)
    again, follower = Net(), NaP(project_every=2)
    resumed = torch.optim.Adam(again.parameters(), lr=0.05)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    follower.load_state_dict(deepcopy(projection.state_dict()))
    for _ in train(again, follower, steps=3, optimizer=resumed, seed=5):
        pass
    projection.called = False
    for _ in train(model, projection, steps=3, optimizer=optimizer, seed=5):
        pass
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert follower.step == 8


def test_without_it_norms_grow_and_with_it_they_do_not():
    norms = []
    for project in (False, True):
        torch.manual_seed(0)
        model, projection = Net(), NaP()
        start = model.inner[1].weight.detach().norm()
        for _ in train(model, projection if project else NaP(project_every=1000), steps=40):
            pass
        norms.append(float(model.inner[1].weight.detach().norm() / start))
    assert norms[0] > 1.5
    assert abs(norms[1] - 1) < 1e-12


def test_bad_input():
    with pytest.raises(ValueError, match=r"projection.project_every is a number of steps, at least 1; got 0"):
        NaP(project_every=0)
    with pytest.raises(ValueError, match=r"projection.affine is none, joint or to_init; got 'both'"):
        NaP(affine="both")
    with pytest.raises(ValueError, match=r"projection.reg_to_init must not be negative; got -1"):
        NaP(reg_to_init=-1.0)
    with pytest.raises(ValueError, match="projection=nap needs linear layers, embeddings or convolutions"):
        NaP()(nn.LayerNorm(3))
