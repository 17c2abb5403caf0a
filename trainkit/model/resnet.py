"""Residual networks (He et al., CVPR 2016, arXiv:1512.03385), with a stem for small images or that of ImageNet."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.model.parts.conv import ConvNorm, check_sizes
from trainkit.model.parts.linear import linear

NormLayer = Callable[..., nn.Module]


class Basic(nn.Module):
    """relu(f(x) + shortcut(x)), f = norm conv3x3 relu norm conv3x3; the first convolution has the stride."""

    expansion = 1

    def __init__(self, inputs: int, width: int, norm_layer: NormLayer, *, stride: int = 1):
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, norm_layer, stride=stride)
        self.conv2 = ConvNorm(width, width, norm_layer, activate=False)
        self.shortcut = shortcut(inputs, width, norm_layer, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """relu(f(x) + shortcut(x)), f = norm conv1x1 relu norm conv3x3 relu norm conv1x1, the last to 4 width channels.

    The 3x3 convolution has the stride, as in torchvision's networks (the paper's has it one earlier).
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, norm_layer: NormLayer, *, stride: int = 1):
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = ConvNorm(inputs, width, norm_layer, kernel=1)
        self.conv2 = ConvNorm(width, width, norm_layer, stride=stride)
        self.conv3 = ConvNorm(width, outputs, norm_layer, kernel=1, activate=False)
        self.shortcut = shortcut(inputs, outputs, norm_layer, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


def shortcut(inputs: int, outputs: int, norm_layer: NormLayer, stride: int) -> nn.Module:
    """x itself, or norm(conv1x1(x)) where the shape changes."""
    if inputs == outputs and stride == 1:
        return nn.Identity()
    return ConvNorm(inputs, outputs, norm_layer, kernel=1, stride=stride, activate=False)


class ResNet(nn.Module):
    """images (B, C, H, W) -> logits (B, classes): head(features(images)).

    features = mean over positions of blocks(pool(relu(embed(images)))). stages: blocks in each stage; every stage but
    the first doubles the channels, `width` at first, and halves height and width. stem: "cifar", a 3x3 convolution of
    stride 1 (pool: nothing); "imagenet", 7x7 of stride 2 and a 3x3 max pool of stride 2. stages=(2, 2, 2, 2) is
    ResNet-18, of 11,173,962 parameters with the small stem, batch norm and 10 classes; (3, 4, 6, 3) with
    bottleneck=True is ResNet-50, of 25,557,032 with that of ImageNet and 1000 classes. width=20 is the reduced
    ResNet-18 of the continual-learning literature.

    A norm follows every convolution, before the activation or the sum: this order makes the network, so there is no
    placement to choose, and `norm_layer` says which norm. 8x8 pixels are 1x1 in the fourth stage, where instance norm
    has nothing to compare and leaves its bias alone.
    """

    def __init__(
        self,
        image: Sequence[int],
        classes: int,
        norm_layer: NormLayer,
        *,
        stages: Sequence[int] = (2, 2, 2, 2),
        bottleneck: bool = False,
        width: int = 64,
        stem: str = "cifar",
    ):
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"model.stem is cifar or imagenet; got {stem!r}")
        check_sizes(image, classes=classes, width=width, stages=min(stages, default=0))
        large = stem == "imagenet"
        self.embed = ConvNorm(image[0], width, norm_layer, kernel=7 if large else 3, stride=2 if large else 1)
        self.embed.conv.role = "embed"  # type: ignore[assignment]
        self.pool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        kind = Bottleneck if bottleneck else Basic
        blocks: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(stages):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(kind(channels, width * 2**stage, norm_layer, stride=stride))
                channels = kind.expansion * width * 2**stage
        self.blocks = nn.ModuleList(blocks)
        self.head = linear(channels, classes, bias=True, std=channels**-0.5)
        self.head.role = "head"  # type: ignore[assignment]

    def features(self, images: Tensor) -> Tensor:
        """What the head reads: (B, C, H, W) -> (B, channels of the last stage)."""
        x = self.pool(self.embed(images))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
