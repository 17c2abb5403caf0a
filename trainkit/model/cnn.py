"""A small plain convolutional network: convolution, norm, ReLU, again and again."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from trainkit.model.parts.conv import ConvNorm, check_sizes
from trainkit.model.parts.linear import linear


class Layer(nn.Module):
    """One convolution, so that blocks are named as in the other models: blocks.3.conv.…"""

    def __init__(self, conv: nn.Module):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvNet(nn.Module):
    """images (B, C, H, W) -> logits (B, classes): head(features(images)).

    `depth` blocks relu(norm(conv(x))) of 3x3 kernels, the first of `width` channels; every other one doubles the
    channels and halves height and width. features: the mean over positions, (B, width · 2^(depth - 1)). It has no
    residual stream, so no placement: `norm_layer` alone says what stands between a convolution and its activation.
    """

    def __init__(
        self,
        image: Sequence[int],
        classes: int,
        norm_layer: Callable[..., nn.Module],
        *,
        depth: int = 3,
        width: int = 32,
    ):
        super().__init__()
        check_sizes(image, classes=classes, depth=depth, width=width)
        widths = [image[0], *(width * 2**layer for layer in range(depth))]
        self.blocks = nn.ModuleList(
            Layer(ConvNorm(widths[i], widths[i + 1], norm_layer, stride=1 if i == 0 else 2)) for i in range(depth)
        )
        self.blocks[0].conv.conv.role = "embed"  # type: ignore[union-attr]
        self.head = linear(widths[-1], classes, bias=True, std=widths[-1] ** -0.5)
        self.head.role = "head"  # type: ignore[assignment]

    def features(self, images: Tensor) -> Tensor:
        """What the head reads: (B, C, H, W) -> (B, channels of the last block)."""
        x = images
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
