from math import exp, log, sqrt

import pytest
import torch
from torch import Tensor

from trainkit.norm_layer.unified import UnifiedNorm

from .stateful import WIDTH, data, float64, train  # noqa: F401


class Reference:
    """Unified Normalization from its equations, channel by channel in Python's own numbers."""

    def __init__(self, width: int, window: list[int], warmup: int, momentum: float, filtration: bool, eps: float):
        self.sizes, self.warmup, self.momentum, self.filtration, self.eps = window, warmup, momentum, filtration, eps
        self.running, self.e = [1.0] * width, [0.0] * width
        self.squares, self.gradients = ([[0.0] * width for _ in range(size)] for size in window)
        self.i = self.skips = 0

    def call(self, x: Tensor, gy: Tensor, pad: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """y without the bias, gx and the gradient of gain."""
        self.i += 1
        i, (size, back), eps, width = self.i, self.sizes, self.eps, len(self.running)
        s = x[~pad].square().mean(0).tolist()
        skip, before = size == 1, self.running
        roots = [sqrt(v) for row in self.squares for v in row]
        spread = sum((r - sum(roots) / len(roots)) ** 2 for r in roots) / (len(roots) - 1)
        self.squares[i % size] = s
        if self.filtration and size > 1 and i >= self.warmup:
            columns = list(zip(*self.squares, strict=True))
            if any(sum(c) / size - geometric(c) > size * spread for c in columns):
                self.squares[i % size], skip = before, True
                self.skips += 1
        plain = i <= size or i < self.warmup or skip
        v = s if plain else [geometric(c) for c in zip(*self.squares, strict=True)]
        r = [1.0] * width
        if i > max(1000, self.warmup) and not skip:
            r = [min(5.0, max(0.2, sqrt((a + eps) / (b + eps)))) for a, b in zip(v, before, strict=True)]
        self.running = [self.momentum * b + (1 - self.momentum) * a for a, b in zip(v, before, strict=True)]

        root = (torch.tensor(v) + eps).sqrt()
        z, g = x / root, gain * gy * torch.tensor(r)
        mean = (g * z).mean((0, 1)).tolist()
        self.gradients[i % back] = self.e if skip else mean
        columns = zip(*self.gradients, strict=True)
        smooth = mean if i <= back or i < self.warmup or skip else [sum(c) / back for c in columns]
        self.e = [self.momentum * a + (1 - self.momentum) * b for a, b in zip(self.e, smooth, strict=True)]
        gx = (g - torch.tensor(smooth if skip else self.e) * z) / root
        return gain * z, gx, (gy * torch.tensor(r) * z).sum((0, 1))


def geometric(values: tuple[float, ...]) -> float:
    return exp(sum(log(v) for v in values) / len(values)) if min(values) > 0 else 0.0


@pytest.mark.parametrize("start", [0, 1500])
@pytest.mark.parametrize("filtration", [False, True])
@pytest.mark.parametrize("window", [[1, 1], [3, 2]], ids=["alone", "window"])
def test_equations(start, filtration, window):
    knobs = {"window": window, "warmup": 3, "momentum": 0.8, "filtration": filtration, "eps": 1e-3}
    norm, reference = UnifiedNorm(WIDTH, count="call", **knobs), Reference(WIDTH, **knobs)
    norm.steps.fill_(start)
    reference.i = start
    with torch.no_grad():
        norm.gain.copy_(torch.randn(WIDTH))
    scales = [1, 2, 0.5, 1, 30, 1, 1, 0.01, 1, 1]
    for (x, gy), scale in zip(data(len(scales)), scales, strict=True):
        x, pad = scale * x, torch.rand(x.shape[:2]) < 0.3
        norm.zero_grad()
        y, gx = train(norm, x, gy, pad_mask=pad)
        expected = reference.call(x, gy, pad, norm.gain.detach())
        for a, b in zip((y, gx, norm.gain.grad), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        found = (norm.squares, norm.gradients, norm.running_square, norm.running_gradient)
        wanted = (reference.squares, reference.gradients, reference.running, reference.e)
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, torch.tensor(b), rtol=1e-9, atol=1e-12)
        assert (int(norm.steps), int(norm.skips)) == (reference.i, reference.skips)
    if filtration and window == [3, 2]:
        assert 0 < reference.skips < len(scales)  # both branches were taken


def test_one_number_for_both_windows():
    norm = UnifiedNorm(WIDTH, window=3)
    assert norm.squares.shape == norm.gradients.shape == (3, WIDTH)


@pytest.mark.parametrize("window", [0, [2], [2, 0], [1, 2, 3]])
def test_impossible_windows(window):
    with pytest.raises(ValueError, match="window is a number of steps"):
        UnifiedNorm(WIDTH, window=window)
