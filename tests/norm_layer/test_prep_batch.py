import copy

import pytest
import torch

from trainkit.norm_layer.layer import LayerNorm
from trainkit.norm_layer.prep_batch import PRepBN
from trainkit.norm_layer.rms import RMSNorm
from trainkit.norm_layer.stateful import advance

from .stateful import WIDTH, data, float64, same, state, train  # noqa: F401


@pytest.mark.parametrize("first", ["layer", "rms"])
def test_schedule(first):
    norm = PRepBN(WIDTH, first=first, warm=2, steps=3, r0=0.9, init="llama")
    with torch.no_grad():
        norm.second.bn.weight.fill_(0.5)
        norm.second.alpha.fill_(0.3)
    start = (LayerNorm(WIDTH) if first == "layer" else RMSNorm(WIDTH, eps=1e-5), copy.deepcopy(norm.second))
    for t, lam in enumerate([1, 1, 0.9, 0.6, 0.3, 0, 0]):
        x = torch.randn(3, 5, WIDTH)
        before = state(norm.second)
        assert torch.allclose(norm(x), lam * start[0](x) + (1 - lam) * start[1](x), rtol=1e-9, atol=1e-12)
        advance(norm)
        assert same(state(norm.second), before, rtol=0, atol=0) == (t < 2)  # N2 stands still during the warm-up
    assert (int(norm.warm), int(norm.left)) == (0, 0)


def test_eval_is_the_second_alone_at_any_time():
    norm, x = PRepBN(WIDTH, warm=2, steps=3).eval(), torch.randn(2, 3, WIDTH)
    assert torch.allclose(norm(x), 2 * x, rtol=1e-4)  # running statistics 0 and 1, alpha 1
    assert torch.equal(norm(x), norm.second(x))


def test_accumulation_moves_the_counters_once():
    norm = PRepBN(WIDTH, warm=1, steps=3)
    for expected in [(0, 3), (0, 2), (0, 1)]:
        for x, gy in data(4):
            train(norm, x, gy)
        advance(norm)
        assert (int(norm.warm), int(norm.left)) == expected


def test_period_of_calls():
    norm = PRepBN(WIDTH, warm=1, steps=2, period=3, count="call")
    moves = []
    for x, gy in data(9):
        train(norm, x, gy)
        moves.append((int(norm.warm), int(norm.left)))
    assert moves == [(0, 2)] * 3 + [(0, 1)] * 3 + [(0, 0)] * 3


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"first": "batch"}, "norm_layer.first is layer or rms"),
        ({"steps": 0}, "norm_layer.steps 1; got 0 and 0"),
        ({"warm": -1}, "norm_layer.warm must be at least 0"),
        ({"period": 16}, "norm_layer.period is a number of calls.*try norm_layer.period=1"),
        ({"period": 0, "count": "call"}, "norm_layer.period is a number of calls"),
    ],
)
def test_impossible_settings(knobs, message):
    with pytest.raises(ValueError, match=message):
        PRepBN(WIDTH, **knobs)
