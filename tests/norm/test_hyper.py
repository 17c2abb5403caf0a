"""mHC-lite against its equations, token by token, and the properties of its mixing."""

from itertools import permutations
from math import factorial

import pytest
import torch

from trainkit.norm.placement import Site

from .stack import WIDTH, Toy, menu, rms, scatter, toys

pytestmark = pytest.mark.usefixtures("float64")


def connection(streams, index=0):
    site = Site("mlp", WIDTH, layer=index, depth=9, index=index, count=9)
    return menu("hyper", streams=streams).around(Toy(WIDTH), site)


def mixing_connection(streams):
    """One whose permutations all count; at the start the identity outweighs the others by e^8."""
    module = scatter(connection(streams))
    with torch.no_grad():
        module.read_mix_bias.copy_(torch.randn(module.read_mix_bias.shape))
    return module


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_equations(streams):
    module = mixing_connection(streams)
    x = torch.randn(2, 3, streams, WIDTH)
    y = module(x)
    orders = list(permutations(range(streams)))
    for b in range(2):
        for t in range(3):
            xs = x[b, t]
            v = torch.cat(list(xs))
            n = v / v.norm() * (streams * WIDTH) ** 0.5 * (1 + module.gain)
            logits = n @ module.read_mix
            p = torch.sigmoid(module.read_scale * logits[:streams] + module.read_mix_bias[:streams])
            w = torch.softmax(module.mix_scale * logits[streams:] + module.read_mix_bias[streams:], 0)
            mixing = torch.zeros(streams, streams)
            for weight, order in zip(w, orders, strict=True):
                for i, j in enumerate(order):
                    mixing[i, j] += weight
            q = 2 * torch.sigmoid(module.write_scale * (n @ module.write) + module.write_bias)
            u = module.f(rms((p[:, None] * xs).sum(0), module.pre.gain))
            for s in range(streams):
                expected = sum(mixing[r, s] * xs[r] for r in range(streams)) + q[s] * u
                torch.testing.assert_close(y[b, t, s], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("streams", [1, 2, 3, 4, 5])
def test_mixing_is_doubly_stochastic_and_keeps_the_sum(streams):
    module = mixing_connection(streams)
    x = torch.randn(2, 3, streams, WIDTH)
    _, mixing, _ = module.weights(x)
    ones = torch.ones(2, 3, streams)
    assert (mixing >= 0).all()
    torch.testing.assert_close(mixing.sum(-1), ones)
    torch.testing.assert_close(mixing.sum(-2), ones)
    _, mixed, _ = module.route(x)
    torch.testing.assert_close(mixed.sum(-2), x.sum(-2))
    if streams > 1:
        assert (mixing - torch.eye(streams)).abs().max() > 0.1


@pytest.mark.parametrize("index", [0, 5])
def test_first_values(index):
    module = connection(4, index)
    favourite = torch.full((4,), -1.0)
    favourite[index % 4] = 1.0
    mixing = torch.tensor([0.0] + [-8.0] * (factorial(4) - 1))
    torch.testing.assert_close(module.read_mix_bias.detach(), torch.cat([favourite, mixing]))
    torch.testing.assert_close(module.write_bias.detach(), favourite)
    for scale in (module.read_scale, module.mix_scale, module.write_scale):
        torch.testing.assert_close(scale.detach(), torch.tensor([0.01]))
    for zero in (module.gain, module.read_mix, module.write):
        assert not zero.any()


def test_equal_streams_differ_by_the_writing_only():
    module, x = connection(4), torch.randn(2, 3, 1, WIDTH).expand(2, 3, 4, WIDTH)
    change = module(x) - x
    favourite, *others = change.unbind(-2)
    torch.testing.assert_close(others[0], others[1])
    torch.testing.assert_close(others[0], others[2])
    ratio = torch.sigmoid(torch.tensor(1.0)) / torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(favourite, ratio * others[0])


def test_a_model_starts_from_copies_and_ends_with_the_norm_of_their_sum():
    placement, x = menu("hyper", streams=3), torch.randn(2, 5, WIDTH)
    streams = placement.before(Site("embed", WIDTH))(x)
    assert streams.shape == (2, 5, 3, WIDTH)
    assert all(torch.equal(s, x) for s in streams.unbind(-2))
    other = torch.randn(2, 5, 3, WIDTH)
    torch.testing.assert_close(placement.after(Site("head", WIDTH))(other), rms(other.sum(-2)))


def test_each_sublayer_favours_the_next_stream():
    model = toys(menu("hyper", streams=4), depth=3)
    assert [s.write_bias.argmax().item() for s in model.sublayers] == [0, 1, 2, 3, 0, 1]
