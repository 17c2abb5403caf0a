"""resnet18, resnet50 and cnn against networks of plain torch.nn layers with the same weights."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from tests.menu import build, options
from trainkit.launch.explain import UserError
from trainkit.launch.preflight import check
from trainkit.launch.sources import CONF
from trainkit.measure.sites import sites
from trainkit.model.cnn import ConvNet
from trainkit.model.parts.conv import ConvNorm
from trainkit.model.resnet import ResNet
from trainkit.norm_layer.batch import BatchNorm2d
from trainkit.norm_layer.evonorm_b0 import EvoNormB0
from trainkit.norm_layer.stateful import advance
from trainkit.optimizer.partition import roles

DIGITS = ["data.image=[1,8,8]", "data.classes=10"]
CIFAR = ["data.image=[3,32,32]", "data.classes=10"]
MODELS = ("resnet18", "resnet50", "cnn")


class Conv(nn.Module):
    """Convolution and torch's batch norm."""

    def __init__(self, inputs, outputs, kernel, stride):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x))


class Block(nn.Module):
    def __init__(self, shapes, short):
        super().__init__()
        for i, shape in enumerate(shapes, 1):
            setattr(self, f"conv{i}", Conv(*shape))
        self.count, self.short = len(shapes), short
        if short:
            self.shortcut = Conv(*short)

    def forward(self, x):
        h = x
        for i in range(1, self.count):
            h = torch.relu(getattr(self, f"conv{i}")(h))
        h = getattr(self, f"conv{self.count}")(h)
        return torch.relu(h + (self.shortcut(x) if self.short else x))


class Plain(nn.Module):
    def __init__(self, blocks, channels, *, width, stem=3, pool=False):
        super().__init__()
        self.embed = Conv(3, width, stem, 2 if stem == 7 else 1)
        self.pool = pool
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        x = torch.relu(self.embed(x))
        x = F.max_pool2d(x, 3, 2, 1) if self.pool else x
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


def plain_resnet18(w):
    def basic(i, o, s):
        return Block([(i, o, 3, s), (o, o, 3, 1)], (i, o, 1, s) if (i, s) != (o, 1) else None)

    pairs = [(w, w, 1), (w, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 1)]
    pairs += [(2 * w, 4 * w, 2), (4 * w, 4 * w, 1), (4 * w, 8 * w, 2), (8 * w, 8 * w, 1)]
    return Plain([basic(*p) for p in pairs], 8 * w, width=w)


def plain_resnet50(w):
    blocks, inputs = [], w
    for width, count, first in ((w, 3, 1), (2 * w, 4, 2), (4 * w, 6, 2), (8 * w, 3, 2)):
        for i in range(count):
            s = first if i == 0 else 1
            short = (inputs, 4 * width, 1, s) if i == 0 else None
            blocks.append(Block([(inputs, width, 1, 1), (width, width, 3, s), (width, 4 * width, 1, 1)], short))
            inputs = 4 * width
    return Plain(blocks, 32 * w, width=w, stem=7, pool=True)


def plain_cnn(w):
    class Layer(nn.Module):
        def __init__(self, *shape):
            super().__init__()
            self.conv = Conv(*shape)

        def forward(self, x):
            return torch.relu(self.conv(x))

    net = Plain([Layer(3, w, 3, 1), Layer(w, 2 * w, 3, 2), Layer(2 * w, 4 * w, 3, 2)], 4 * w, width=w)
    net.embed = nn.Identity()
    return net


@pytest.mark.parametrize(
    ("words", "plain"),
    [
        (["model=resnet18", "model.width=6"], plain_resnet18(6)),
        (["model=resnet50", "model.width=2", "model.stem=imagenet"], plain_resnet50(2)),
        (["model=cnn", "model.width=5"], plain_cnn(5)),
    ],
    ids=MODELS,
)
def test_equals_plain_layers(words, plain):
    torch.manual_seed(0)
    net, plain = build("model", *words, *CIFAR, "norm_layer.count=call").double(), plain.double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if "sum" not in k})
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64).abs(), torch.randint(10, (4,))
    for training in (True, False):  # the second with what the first left in the running statistics
        logits, expected = net.train(training)(x), plain.train(training)(x)
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
        for model, out in ((net, logits), (plain, expected)):
            model.zero_grad()
            F.cross_entropy(out, y).backward()
        wanted = dict(plain.named_parameters())
        assert len(wanted) == len(list(net.parameters()))
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.grad, wanted[name].grad, rtol=1e-10, atol=1e-10, msg=name)


def test_published_sizes():
    def size(*words):
        with torch.device("meta"):
            return sum(p.numel() for p in build("model", *words).parameters())

    assert size("model=resnet18", *CIFAR) == 11_173_962
    large = ["data.image=[3,224,224]", "data.classes=1000", "model.stem=imagenet"]
    assert size("model=resnet18", *large) == 11_689_512
    assert size("model=resnet50", *large) == 25_557_032


@pytest.mark.parametrize("model", MODELS)
def test_head_reads_features(model):
    net = build("model", f"model={model}", "model.width=4", *DIGITS).eval()
    x = torch.randn(3, 1, 8, 8)
    features = net.features(x)
    assert features.shape == (3, net.head.in_features)
    assert torch.equal(net.head(features), net(x))
    assert roles(net)["head"] == [net.head.weight]
    assert [p.shape[1] for p in roles(net)["embed"]] == [1]


@pytest.mark.parametrize("model", MODELS)
def test_kernels_are_drawn_as_he_says(model):
    torch.manual_seed(0)
    net = build("model", f"model={model}", "model.width=16", *CIFAR)
    z = [m.conv.weight * (m.conv.weight[0].numel() / 2) ** 0.5 for m in net.modules() if isinstance(m, ConvNorm)]
    drawn = torch.cat([weight.flatten() for weight in z])
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    assert all(abs(weight.std() - 1) < 0.15 for weight in z)


def test_gradients_are_told_apart_by_block_and_part():
    labels = sites(build("model", "model=resnet18", "model.width=4", *DIGITS))
    assert {"embed", "head", "blocks.0.conv1", "blocks.7.conv2", "blocks.2.shortcut", "blocks.7.norm"} <= set(labels)
    assert "blocks.0.shortcut" not in labels
    assert len(labels["blocks.2.norm"]) == 6  # gain and offset of two norms and of the shortcut's
    assert "blocks.1.conv" in sites(build("model", "model=cnn", "model.width=4", *DIGITS))


@pytest.mark.parametrize("name", options("norm_layer"))
def test_takes_every_norm_layer_on_the_channels(name):
    """Two steps on 8x8 images; every parameter gets a finite gradient."""
    torch.manual_seed(0)
    settings = OmegaConf.load(CONF / "norm_layer" / f"{name}.yaml")
    if "groups" in settings:
        settings.groups = 4
    norm_layer = instantiate(settings)
    for net in (ResNet((1, 8, 8), 10, norm_layer, width=8), ConvNet((1, 8, 8), 10, norm_layer, width=8)):
        norms = [m.norm for m in net.modules() if isinstance(m, ConvNorm)]
        axes = {m.axis for norm in norms for m in norm.modules() if hasattr(m, "axis")}
        assert axes <= {1}
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(torch.randn(6, 1, 8, 8)), torch.randint(10, (6,)))
            loss.backward()
            assert loss.isfinite()
            for parameter, p in net.named_parameters():
                assert p.grad is not None, parameter
                assert p.grad.isfinite().all(), parameter
            optimizer.step()
            advance(net)
        assert net.eval()(torch.randn(1, 1, 8, 8)).isfinite().all()


def test_batch_norm_by_default_and_a_bias_only_without_a_norm():
    for model in MODELS:
        net = build("model", f"model={model}", "model.width=4", *DIGITS)
        for part in net.modules():
            if isinstance(part, ConvNorm):
                assert type(part.norm) is BatchNorm2d
                assert part.conv.bias is None
    net = build("model", "model=cnn", "norm_layer=none", *DIGITS)
    assert all(
        torch.equal(block.conv.conv.bias, torch.zeros(n)) for block, n in zip(net.blocks, (32, 64, 128), strict=True)
    )


def test_bad_input():
    with pytest.raises(
        UserError, match=r"model=resnet18 cannot work without norm=pre; the command line says norm=peri"
    ):
        check(["model=resnet18", "norm=peri"])
    with pytest.raises(UserError, match="model=cnn cannot work without task"):
        check(["model=cnn", "data=text", "data.path=x"])
    cases = {
        "model.stem=small": "model.stem is cifar or imagenet; got 'small'",
        "model.width=0": "model.width must be at least 1; got 0",
        "model.stages=[2,0]": "model.stages must be at least 1; got 0",
        "model.stages=[]": "model.stages must be at least 1; got 0",
        "data.image=[8,8]": r"model.image must be \[channels, height, width\]; got \[8, 8\]",
        "norm_layer=group": "norm_layer.groups must divide the width 20; got 32. Try norm_layer.groups=1",
    }
    for word, message in cases.items():
        with pytest.raises(Exception, match=message) as caught:
            build("model", "model=resnet18", "model.width=20", *DIGITS, word)
        assert isinstance(caught.value.__cause__ or caught.value, ValueError)


def test_a_norm_that_is_its_own_activation_gets_no_other():
    model = ResNet([3, 8, 8], 4, EvoNormB0, width=4)
    block = model.blocks[0]
    assert block.conv1.norm.activates
    assert not block.conv2.norm.activates
    x = torch.randn(5, 4, 8, 8)
    assert block.conv1(x).min() < 0  # a ReLU would have cut that off
    torch.testing.assert_close(block.conv1(x), block.conv1.norm(block.conv1.conv(x)))
    plain = ResNet([3, 8, 8], 4, build("norm_layer", "norm_layer=batch"), width=4).blocks[0].conv1
    torch.testing.assert_close(plain(x), plain.norm(plain.conv(x)).relu())
