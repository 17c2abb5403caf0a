"""A convolution and its norm, the piece that every convolutional network here is made of."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from trainkit.norm_layer.identity import Identity


class ConvNorm(nn.Module):
    """relu(norm(conv(x))), or norm(conv(x)) with activate=False; (B, inputs, H, W) -> (B, outputs, H / stride, …).

    Kernels are square, padded with zeros, from N(0, 2/fan_in) (He et al. 2015, arXiv:1502.01852). The norm's offset
    does what a bias would do, so the convolution has one only where the norm layer is none. A norm layer that is its
    own activation (EvoNorm) gets no ReLU behind it, and is told where there is to be none.
    """

    feeds_activation = ("conv", "norm")  # the layer, and the norm between it and the activation

    def __init__(
        self,
        inputs: int,
        outputs: int,
        norm_layer: Callable[..., nn.Module],
        *,
        kernel: int = 3,
        stride: int = 1,
        activate: bool = True,
    ):
        super().__init__()
        norm = norm_layer(outputs, axis=1)
        bias = isinstance(norm, Identity)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        self.norm, self.activate = norm, activate
        if not activate and hasattr(norm, "deactivate"):
            norm.deactivate()  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        # Norms over channels return them last in memory. Networks of 4 channels whose convolutions took such inputs
        # crashed in the backward on a CPU (torch 2.13, with oneDNN), of a heap written past its end.
        y = self.norm(self.conv(x.contiguous()))
        return F.relu(y) if self.activate and not getattr(self.norm, "activates", False) else y


def check_sizes(image: Sequence[int], **counts: int) -> None:
    """Raises ValueError unless `image` is (channels, height, width) and every count, a key of the model, is above 0."""
    if len(image) != 3:
        raise ValueError(f"model.image must be [channels, height, width]; got {list(image)}")
    for key, value in counts.items():
        if value < 1:
            raise ValueError(f"model.{key} must be at least 1; got {value}")
