"""Gradients that grow by at most 1 % per step."""

from functools import partial

import pytest
import torch
from torch import nn

from tests.callbacks.toy import Toy, fit
from trainkit.gradient.norm_growth_limit import NormGrowthLimit


def series(count=12, seed=0):
    """Gradients of three tensors for some steps, with spikes and drops."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        scale = (1.0, 5.0, 1.02, 0.1, 100.0)[step % 5]
        yield [torch.randn(s, generator=generator, dtype=torch.float64) * scale for s in ((3, 4), (5,), (2, 2))]


@pytest.mark.parametrize("of", ["model", "tensor"])
def test_formula_and_bound(of):
    limiter, last = NormGrowthLimit(1.1, of=of, eps=1e-6), {}
    for made in series():
        expected = [g.clone() for g in made]
        parts = [[i] for i in range(3)] if of == "tensor" else [[0, 1, 2]]
        for key, members in enumerate(parts):
            norm = sum(expected[i].square().sum() for i in members) ** 0.5
            if key in last:
                growth = max(norm / (last[key] + 1e-6), 1.1) / 1.1
                for i in members:
                    expected[i] /= growth
                norm = norm / growth
                assert norm <= 1.1 * (last[key] + 1e-6) * (1 + 1e-12)
            last[key] = norm
        values = limiter(made)
        for after, e in zip(made, expected, strict=True):
            torch.testing.assert_close(after, e, rtol=1e-12, atol=0)
        total = torch.cat([g.flatten() for g in made]).norm()
        torch.testing.assert_close(values["grad_norm/limited"], total, rtol=1e-12, atol=0)


@pytest.mark.parametrize("of", ["model", "tensor"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_zero_and_non_finite_norms_are_no_predecessors(of, value):
    limiter = NormGrowthLimit(of=of)
    limiter([torch.full((4,), value)])
    first = [torch.ones(4)]
    limiter(first)
    assert torch.equal(first[0], torch.ones(4))
    now = [torch.full((4,), value)]
    limiter(now)
    assert torch.equal(now[0], torch.zeros(4)) if value == 0 else not now[0].isfinite().any()
    after = [torch.full((4,), 10.0)]
    limiter(after)
    torch.testing.assert_close(after[0], torch.full((4,), 1.01))


def test_a_tensor_without_a_gradient_keeps_its_norm():
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(3)])
    limiter = NormGrowthLimit(2.0, of="tensor")
    limiter.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for values in ([1.0, None, 3.0], [9.0, 9.0, 9.0], [None, 40.0, None]):
        for p, value in zip(model, values, strict=True):
            p.grad = None if value is None else torch.tensor([value])
        limiter([p.grad for p in model if p.grad is not None])
    assert limiter.last is not None
    assert limiter.last.tolist() == pytest.approx([2.0, 18.0, 6.0])


@pytest.mark.parametrize("of", ["model", "tensor"])
def test_a_saved_norm_limits_the_next_step(of):
    limiter, resumed = NormGrowthLimit(of=of), NormGrowthLimit(of=of)
    steps = list(series())
    for made in steps[:4]:
        limiter(made)
    resumed.load_state_dict(limiter.state_dict())
    one, two = ([g.clone() for g in steps[4]] for _ in range(2))
    limiter(one)
    resumed(two)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    fresh = [g.clone() for g in steps[4]]
    NormGrowthLimit(of=of)(fresh)
    assert not torch.equal(fresh[0], one[0])


def test_a_resumed_run_goes_on_as_if_never_stopped(tmp_path):
    from callbacks.checkpoint import LastAndBest

    def task():
        return Toy(optimizer=partial(torch.optim.SGD, lr=0.01), gradient=NormGrowthLimit(1.001, of="tensor"))

    _, unbroken = fit(tmp_path / "unbroken", [LastAndBest()], task=task(), max_steps=8)
    fit(tmp_path / "run", [LastAndBest()], task=task(), max_steps=4)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["gradient"]["state"]["last"].shape == (len(list(unbroken.model.parameters())),)
    other = Toy(optimizer=partial(torch.optim.SGD, lr=0.01), gradient=lambda gradients: {})
    fit(
        tmp_path / "other", [], task=other, max_steps=8, checkpoint=checkpoint
    )  # with another treatment it goes on, too
    assert not all(torch.equal(p, q) for p, q in zip(other.parameters(), unbroken.parameters(), strict=True))

    _, resumed = fit(tmp_path / "run", [LastAndBest()], task=task(), max_steps=8, checkpoint=checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), unbroken.parameters(), strict=True))


@pytest.mark.parametrize("bad", [{"limit": 0.9}, {"of": "layer"}, {"eps": -1.0}, {"limit": float("inf")}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=rf"gradient\.{next(iter(bad))}"):
        NormGrowthLimit(**bad)
