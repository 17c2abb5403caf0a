"""IBN-Net-a from a ResNet: where it changes norms, and that trained weights stay."""

from functools import partial

import pytest
import torch
from torch import nn

from trainkit.model.resnet import ResNet
from trainkit.norm_layer.batch import BatchNorm2d, batch
from trainkit.norm_layer.ibn import IBN
from trainkit.norm_layer.layer import LayerNorm
from trainkit.surgery.ibn import ibn_a

BATCH = partial(batch, count="step", momentum=0.2, eps=1e-3)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_the_first_norm_of_every_branch_but_in_the_last_stage(bottleneck):
    model = ibn_a(ResNet((3, 8, 8), 5, BATCH, stages=(2, 1, 1, 2), width=4, bottleneck=bottleneck))
    changed = [name for name, module in model.named_modules() if isinstance(module, IBN)]
    assert changed == [f"blocks.{block}.conv1.norm" for block in range(4)]
    for block in range(4):
        norm = model.blocks[block].conv1.norm
        assert (norm.batch.momentum, norm.batch.eps, norm.instance.eps, norm.batch.count) == (0.2, 1e-3, 1e-3, "step")
    assert isinstance(model.blocks[2].shortcut.norm, BatchNorm2d)
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_what_was_trained_stays():
    model = ResNet((3, 8, 8), 5, BATCH, stages=(1, 1), width=4).double()
    norm = model.blocks[0].conv1.norm
    with torch.no_grad():
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            t.add_(torch.rand_like(t))
        norm.num_batches_tracked.fill_(7)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = norm.eval()(x)[:, 1:], nn.functional.instance_norm(x[:, :1]) * norm.weight[0] + norm.bias[0]
    new = ibn_a(model, ratio=0.25).blocks[0].conv1.norm
    assert not new.training
    assert new.batch.num_batches_tracked == 7
    torch.testing.assert_close(new(x)[:, 1:], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new(x)[:, :1], expected[1], rtol=1e-2, atol=1e-2)  # torch's eps is another


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: nn.Linear(2, 2), "IBN-Net-a is a ResNet; got Linear"),
        (lambda: ResNet((3, 8, 8), 5, LayerNorm, stages=(1, 1), width=4), "conv1.norm is LayerNorm. Try norm_layer=b"),
        (lambda: ResNet((3, 8, 8), 5, BATCH, stages=(2,), width=4), "leaves the last stage as it is"),
    ],
)
def test_bad_input(model, says):
    with pytest.raises(ValueError, match=says):
        ibn_a(model())
