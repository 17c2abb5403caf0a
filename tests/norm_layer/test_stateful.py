"""What every layer with a memory promises: counting, accumulation, checkpointing, padding, resuming, precision."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainkit.norm_layer.power import PowerNorm
from trainkit.norm_layer.stateful import Stateful, advance
from trainkit.norm_layer.unified import UnifiedNorm

from .stateful import LAYERS, WIDTH, counters, counts, data, float64, layers, make, same, state, train  # noqa: F401


@layers
def test_state_stands_still_between_steps(name):
    layer = make(name, count="step")
    for x, gy in data(3):
        train(layer, x, gy)
        advance(layer)
    before, results = state(layer), []
    x, gy = data(1)[0]
    for _ in range(2):
        results.append(train(layer, x, gy))
        assert same(state(layer), before, rtol=0, atol=0)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    advance(layer)
    after = state(layer)
    assert not same(after, before)
    assert all(abs(a - b) <= 1 for a, b in zip(counters(after), counters(before), strict=True))
    advance(layer)
    assert same(state(layer), after, rtol=0, atol=0)


@layers
def test_one_batch_per_step_equals_counting_calls(name):
    by_step = make(name, count="step")
    by_call = LAYERS[name](WIDTH, count="call")
    by_call.load_state_dict(by_step.state_dict())
    for x, gy in data(6):
        expected, actual = train(by_call, x, gy), train(by_step, x, gy)
        advance(by_step)
        assert torch.allclose(actual[0], expected[0], rtol=1e-12)
        assert torch.allclose(actual[1], expected[1], rtol=1e-12)
        assert same(state(by_step), state(by_call), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "buffer"),
    [
        ("batch", "running_mean"),
        ("power", "running_square"),
        ("power_v", "running_square"),
        ("unified", "squares"),
        ("rep_batch", "bn.running_mean"),
    ],
)
def test_micro_batches_add_up(name, buffer):
    whole, parts = make(name, count="step"), make(name, count="step")
    parts.load_state_dict(whole.state_dict())
    for x, gy in data(3, 4, 5, WIDTH):
        train(whole, x, gy)
        for piece, g in zip(x.split([1, 3]), gy.split([1, 3]), strict=True):
            train(parts, piece, g)
        advance(whole)
        advance(parts)
    assert torch.allclose(parts.state_dict()[buffer], whole.state_dict()[buffer], rtol=1e-12)
    assert counters(state(parts)) == counters(state(whole))


class Net(nn.Module):
    """The layer twice in one graph, with or without checkpointing."""

    def __init__(self, norm: nn.Module, reentrant: bool | None):
        super().__init__()
        self.norm, self.reentrant = norm, reentrant

    def call(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.call(x) if self.reentrant is None else checkpoint(self.call, x, use_reentrant=self.reentrant)
        return x


@layers
@counts
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_activation_checkpointing_changes_nothing(name, count, reentrant):
    plain = Net(make(name, count=count), None)
    stored = Net(copy.deepcopy(plain.norm), reentrant)
    for x, gy in data(5):
        for net in (plain, stored):
            net.zero_grad()
        expected, actual = train(plain, x, gy), train(stored, x, gy)
        advance(plain)
        advance(stored)
        assert torch.allclose(actual[0], expected[0], rtol=1e-12)
        assert torch.allclose(actual[1], expected[1], rtol=1e-9, atol=1e-12)
        for p, q in zip(plain.parameters(), stored.parameters(), strict=True):
            assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)
        assert same(state(plain.norm), state(stored.norm), rtol=1e-12)


@layers
def test_two_forwards_before_one_backward(name):
    layer = make(name, count="step")
    twin = copy.deepcopy(layer)
    (x1, g1), (x2, g2) = data(2)
    separate = [train(twin, x1, g1)[1], train(twin, x2, g2)[1]]
    a, b = x1.clone().requires_grad_(), x2.clone().requires_grad_()
    ((layer(a) * g1).sum() + (layer(b) * g2).sum()).backward()
    assert torch.allclose(a.grad, separate[0], rtol=1e-12)
    assert torch.allclose(b.grad, separate[1], rtol=1e-12)
    advance(layer)
    advance(twin)
    assert same(state(layer), state(twin), rtol=1e-12)


@layers
@counts
def test_padding_does_not_count(name, count):
    layer = make(name, count=count)
    twin = copy.deepcopy(layer)
    pad = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [True] * 5])
    for x, _ in data(4):
        y = layer(x, pad_mask=pad)
        z = twin(torch.where(pad.unsqueeze(-1), float("nan"), x), pad_mask=pad)
        assert torch.allclose(y[~pad], z[~pad], rtol=1e-12)
        advance(layer)
        advance(twin)
        assert same(state(layer), state(twin), rtol=1e-12)


@layers
def test_without_padding_a_mask_changes_nothing(name):
    layer = make(name, count="step")
    twin = copy.deepcopy(layer)
    for x, gy in data(4):
        expected, actual = train(layer, x, gy), train(twin, x, gy, pad_mask=torch.zeros(x.shape[:2], dtype=torch.bool))
        advance(layer)
        advance(twin)
        assert torch.allclose(actual[0], expected[0], rtol=1e-12)
        assert torch.allclose(actual[1], expected[1], rtol=1e-9, atol=1e-12)
    assert same(state(layer), state(twin), rtol=1e-12)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@layers
@counts
@pytest.mark.parametrize("shape", [(2, 3, WIDTH), (0, 3, WIDTH)], ids=["all padding", "no token"])
def test_batches_without_tokens_change_nothing(name, count, shape):
    layer = make(name, count=count)
    pad = torch.ones(shape[:2], dtype=torch.bool) if shape[0] else None
    for step in range(3):
        before, x = state(layer), torch.randn(shape)
        y, gx = train(layer, x, torch.randn(shape), pad_mask=pad)
        advance(layer)
        assert y.shape == gx.shape == shape
        assert gx.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
        assert same(state(layer), before, rtol=0, atol=0)
        if name != "prep_batch" or step == 0:  # which still mixes in its first norm
            expected = layer.first(x) if name == "prep_batch" else copy.deepcopy(layer).eval()(x, pad_mask=pad)
            assert torch.allclose(y, expected, rtol=1e-12)
        train(layer, *data(1)[0])
        advance(layer)


@layers
def test_one_token(name):
    layer = make(name, count="step")
    y, gx = train(layer, torch.randn(1, 1, WIDTH), torch.randn(1, 1, WIDTH))
    advance(layer)
    assert y.isfinite().all()
    assert gx.isfinite().all()
    assert all(b.isfinite().all() for b in state(layer).values())


@layers
def test_pad_mask_of_another_shape(name):
    with pytest.raises(ValueError, match=r"pad_mask must be boolean and of shape \(2, 3\)"):
        make(name)(torch.randn(2, 3, WIDTH), pad_mask=torch.zeros(3, 2, dtype=torch.bool))


@layers
@counts
def test_nan_reaches_the_output(name, count):
    layer = make(name, count=count)
    x = torch.randn(2, 3, WIDTH)
    x[1, 1, 4] = float("nan")
    assert layer(x)[1, 1, 4].isnan()
    assert layer.eval()(x)[1, 1, 4].isnan()


@layers
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", ["module", "input"])
def test_half_precision(name, dtype, cast):
    torch.set_default_dtype(torch.float32)
    layer = make(name, count="step")
    reference = copy.deepcopy(layer).double()
    if cast == "module":
        layer = layer.to(dtype)
        with torch.no_grad():
            for p, q in zip(layer.parameters(), reference.parameters(), strict=True):
                q.copy_(p)
    for x, gy in data(4):
        x = (x * 1000).to(dtype)  # squares and their sums exceed float16's 65504
        y, gx = train(layer, x, gy.to(dtype))
        expected = train(reference, x.double(), gy.to(dtype).double())
        advance(layer)
        advance(reference)
        assert y.dtype == gx.dtype == dtype
        assert torch.allclose(y.double(), expected[0], rtol=0.03, atol=0.03)
    buffers = {k: b for k, b in layer.named_buffers() if b.is_floating_point()}
    assert {b.dtype for b in buffers.values()} == {torch.float32}
    expected = dict(reference.named_buffers())
    assert all(torch.allclose(b.double(), expected[k], rtol=0.02, atol=1e-3) for k, b in buffers.items())


@layers
def test_autocast_keeps_the_dtype(name):
    torch.set_default_dtype(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(name)(torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert make(name)(torch.randn(2, 3, WIDTH)).dtype == torch.float32


@layers
@counts
def test_resume(name, count):
    unbroken = make(name, count=count)
    batches = data(5)
    for x, gy in batches[:3]:
        train(unbroken, x, gy)
        advance(unbroken)
    resumed = LAYERS[name](WIDTH, count=count)
    resumed.load_state_dict(unbroken.state_dict())
    for x, gy in batches[3:]:
        for layer in (unbroken, resumed):
            train(layer, x, gy)
            advance(layer)
    assert same(state(resumed), state(unbroken), rtol=0, atol=0)


@layers
def test_axis(name):
    tokens, images = make(name, count="step"), LAYERS[name](WIDTH, axis=1, count="step")
    images.load_state_dict(tokens.state_dict())
    for x, gy in data(3, 2, 3, 4, WIDTH):
        expected = train(tokens, x, gy)
        actual = train(images, x.movedim(-1, 1), gy.movedim(-1, 1))
        advance(tokens)
        advance(images)
        for a, b in zip(actual, expected, strict=True):
            assert torch.allclose(a.movedim(1, -1), b, rtol=1e-9, atol=1e-12)
    assert same(state(tokens), state(images), rtol=1e-12)
    x = torch.randn(2, 3, 4, WIDTH)
    assert torch.allclose(images.eval()(x.movedim(-1, 1)).movedim(1, -1), tokens.eval()(x), rtol=1e-12)


@layers
def test_future_leaks_in_training_alone(name):
    layer = make(name, count="step")
    assert layer.leaks
    x = torch.randn(2, 4, WIDTH)
    other = torch.cat([x[:, :-1], 2 * x[:, -1:]], 1)
    if name == "prep_batch":  # during its warm-up a LayerNorm
        layer.warm.zero_()
        layer.left.fill_(1)
    assert not torch.allclose(layer(x)[:, 0], layer(other)[:, 0])
    layer.eval()
    assert torch.equal(layer(x)[:, 0], layer(other)[:, 0])


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "power"])
def test_scale_shift_is_eval(name):
    layer = make(name, count="step")
    for x, gy in data(4):
        train(layer, x, gy)
        advance(layer)
    layer.eval()
    before, x = state(layer), torch.randn(2, 3, WIDTH)
    a, c = layer.scale_shift()
    assert torch.allclose(layer(x), a * x + c, rtol=1e-12)
    advance(layer)
    assert same(state(layer), before, rtol=0, atol=0)


@layers
def test_memory_kept_for_the_backward(name):
    """At most one tensor beside the input, which LayerNorm keeps too."""
    torch.set_default_dtype(torch.float32)
    layer, kept = LAYERS[name](64), {}
    x = torch.randn(4, 128, 64, requires_grad=True)

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    assert sum(kept.values()) <= 2.2 * x.numel() * x.element_size()


@layers
def test_blocks_do_not_show(name, monkeypatch):
    whole = make(name, count="step")
    blocked = copy.deepcopy(whole)
    pad = torch.rand(3, 5) < 0.3
    for x, gy in data(3):
        expected = train(whole, x, gy, pad_mask=pad)
        with monkeypatch.context() as patch:
            patch.setattr("trainkit.norm_layer.channels.BLOCK", 4 * WIDTH)
            actual = train(blocked, x, gy, pad_mask=pad)
        advance(whole)
        advance(blocked)
        assert torch.allclose(actual[0], expected[0], rtol=1e-12)
        assert torch.allclose(actual[1], expected[1], rtol=1e-9, atol=1e-12)
    assert same(state(whole), state(blocked), rtol=1e-12)


@layers
@pytest.mark.parametrize(("knob", "value"), [("count", "epoch"), ("sync", "max")])
def test_unknown_options(name, knob, value):
    with pytest.raises(ValueError, match=f"norm_layer.{knob} is .* got '{value}'"):
        LAYERS[name](WIDTH, **{knob: value})


@layers
@counts
def test_warns_where_nobody_advances(name, count):
    layer = make(name, count=count)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)

    def steps(announce: bool) -> None:
        for x, gy in data(6):
            train(layer, x, gy)
            optimizer.step()
            if announce:
                advance(layer)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(announce=True)
    if count == "step":
        with pytest.warns(UserWarning, match=r"advance\(model\).* or take norm_layer.count=call"):
            steps(announce=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steps(announce=False)


def test_advance_by_an_optimizer_hook():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), PowerNorm(WIDTH), nn.Sequential(UnifiedNorm(WIDTH)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.register_step_post_hook(lambda *_: advance(model))
    for _ in range(3):
        for x, _gy in data(2):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [int(m.steps) for m in model.modules() if isinstance(m, Stateful)] == [3, 3]
