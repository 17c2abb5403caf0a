import torch

from trainkit.norm_layer.power_v import PowerNormV

from .stateful import WIDTH, data, float64, train  # noqa: F401


def test_formula_and_its_gradient():
    norm = PowerNormV(WIDTH, eps=1e-3, momentum=0.3, count="call")
    with torch.no_grad():
        norm.gain.copy_(torch.randn(WIDTH))
        norm.bias.copy_(torch.randn(WIDTH))
    running = torch.ones(WIDTH)
    for x, gy in data(3):
        pad = torch.rand(x.shape[:2]) < 0.3
        h = x.clone().requires_grad_()
        s = h[~pad].square().mean(0)
        expected = norm.gain * h / (s + 1e-3).sqrt() + norm.bias
        wanted = torch.autograd.grad(expected, [h, norm.gain, norm.bias], gy)
        norm.zero_grad()
        y, gx = train(norm, x, gy, pad_mask=pad)
        assert torch.allclose(y, expected, rtol=1e-12)
        for a, b in zip((gx, norm.gain.grad, norm.bias.grad), wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
        running = 0.7 * running + 0.3 * s.detach()
        assert torch.allclose(norm.running_square, running, rtol=1e-12)
    x = torch.randn(2, 3, WIDTH)
    assert torch.allclose(norm.eval()(x), norm.gain * x / (running + 1e-3).sqrt() + norm.bias, rtol=1e-12)


def test_quadratic_mean_of_the_output_is_one():
    y = PowerNormV(WIDTH)(5 + torch.randn(4, 6, WIDTH))
    assert torch.allclose(y.square().mean((0, 1)), torch.ones(WIDTH), rtol=1e-5)
