"""Tune mode: eval's outputs and gradients from one convolution, without the activation before the norm."""

import copy
from collections import OrderedDict
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainkit.model.resnet import ResNet
from trainkit.norm_layer.batch import batch
from trainkit.surgery.tune import FrozenBatchNorm, tune_mode


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def trained(model):
    """The model with every parameter and running statistic away from its start."""
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn_like(b))
            if name.endswith("running_var"):
                b.copy_(torch.rand_like(b) + 0.5)
    return model


def pair(conv, norm):
    return trained(nn.Sequential(OrderedDict(conv=conv, bn=norm)))


PAIRS = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), lambda: nn.BatchNorm1d(6, eps=1e-2), (2, 4, 7)),
    "2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), lambda: batch(6, axis=1), (2, 4, 6, 5)),
    "padded": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), lambda: nn.BatchNorm2d(6), (2, 4, 6, 5)),
    "without weights": (lambda: nn.Conv2d(4, 6, 3), lambda: nn.BatchNorm2d(6, affine=False), (2, 4, 6, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), lambda: nn.BatchNorm1d(6), (2, 4, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        lambda: nn.BatchNorm2d(6),
        (2, 4, 5, 5),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), lambda: nn.BatchNorm3d(6), (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_outputs_and_gradients_are_those_of_eval(name):
    conv, norm, shape = PAIRS[name]
    model = pair(conv(), norm())
    tuned = tune_mode(copy.deepcopy(model))
    state = copy.deepcopy(tuned.state_dict())
    assert state.keys() == model.state_dict().keys()
    x = torch.randn(shape)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    expected, y = model.eval()(inputs[0]), tuned.train()(inputs[1])
    gy = torch.randn_like(y)
    expected.backward(gy)
    y.backward(gy)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(inputs[1].grad, inputs[0].grad, rtol=1e-10, atol=1e-12)
    wanted = dict(model.named_parameters())
    assert {name for name, _ in tuned.named_parameters()} == set(wanted)
    for name, p in tuned.named_parameters():
        assert torch.allclose(p.grad, wanted[name].grad, rtol=1e-9, atol=1e-11), name
    assert all(torch.equal(value, state[key]) for key, value in tuned.state_dict().items())


def kept(model, x):
    """Numbers stored for the backward, beyond parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    return sum(found.values()), y.numel()


def test_the_activation_between_is_not_kept():
    model = pair(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6))
    tuned, x = tune_mode(copy.deepcopy(model)), torch.randn(2, 4, 16, 16, requires_grad=True)
    before, size = kept(model.eval(), x)
    after, _ = kept(tuned, x)
    assert before >= x.numel() + size
    assert after < x.numel() + size / 2


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_resnet_is_traced_and_every_norm_absorbed(bottleneck):
    settings = {"stages": (1, 1), "width": 4, "bottleneck": bottleneck}
    model = trained(ResNet((3, 8, 8), 5, partial(batch, count="call"), **settings)).eval()
    tuned = tune_mode(copy.deepcopy(model)).train()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in tuned.modules())
    assert sum(isinstance(m, FrozenBatchNorm) for m in tuned.modules()) == sum(
        isinstance(m, nn.BatchNorm2d) for m in model.modules()
    )
    x = torch.randn(2, 3, 8, 8)
    assert torch.allclose(tuned(x), model(x), rtol=1e-9, atol=1e-10)
    back = ResNet((3, 8, 8), 5, partial(batch, count="call"), **settings)
    back.load_state_dict(tuned.state_dict())
    assert torch.equal(back.eval()(x), model(x))


def test_a_copy_and_a_checkpointed_forward_are_independent_of_the_original():
    tuned = tune_mode(pair(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    twin, x = copy.deepcopy(tuned), torch.randn(2, 4, 5, 5, requires_grad=True)
    before = tuned(x)
    with torch.no_grad():
        twin.bn.weight.mul_(2)
    assert torch.equal(tuned(x), before)
    assert not torch.allclose(twin(x), before)
    assert torch.equal(checkpoint(tuned, x, use_reentrant=False), before)


class Branching(nn.Module):
    """norm2 reads what others read, norm3 is called twice, norm1 alone follows alone."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        h = self.conv2(x)
        x = self.norm2(h) + h
        return self.norm3(self.norm3(self.conv3(x)))


def test_only_norms_that_alone_follow_are_absorbed():
    model = trained(Branching()).eval()
    tuned, x = tune_mode(copy.deepcopy(model)), torch.randn(2, 4, 3, 3)
    assert [isinstance(m, FrozenBatchNorm) for m in (tuned.norm1, tuned.norm2, tuned.norm3)] == [True, False, False]
    assert torch.allclose(tuned(x), model(x), rtol=1e-10)


class Deciding(Branching):
    def forward(self, x):
        return self.norm1(self.conv1(x)) if x.sum() > 0 else x


def test_a_model_that_cannot_be_traced_is_told_its_pairs():
    model = trained(Deciding()).eval()
    with pytest.raises(ValueError, match=r"by tracing, which Deciding does not allow.*pairs=\[\['conv1', 'bn1'\]"):
        tune_mode(model)
    tuned, x = tune_mode(copy.deepcopy(model), pairs=[["conv1", "norm1"]]), torch.rand(2, 4, 3, 3)
    assert isinstance(tuned.norm1, FrozenBatchNorm)
    assert torch.allclose(tuned(x), model(x), rtol=1e-10)


@pytest.mark.parametrize(
    ("model", "pairs", "says"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)), None, "the model has none. Try norm_layer=batch"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)), [["0", "1"]], "got 0, Conv2d, and 1, GroupNorm"),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False)), None, "has none"),
        (nn.Sequential(nn.Conv2d(2, 3, 1), batch(2)), [["0", "1"]], "got 0, Conv2d, and 1, BatchNorm"),
    ],
)
def test_bad_input(model, pairs, says):
    with pytest.raises(ValueError, match=says):
        tune_mode(model, pairs)
