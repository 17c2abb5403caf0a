"""Instance normalization (Ulyanov et al. 2016, arXiv:1607.08022): each channel of each sample over its positions."""

import torch
from torch import Tensor, nn

from trainkit.norm_layer.group import grouped
from trainkit.norm_layer.stateful import wide


class InstanceNorm(nn.Module):
    """y = gain · (x - mean)/sqrt(var + eps) + bias; mean, var (biased) over all positions of a sample, per channel.

    gain, bias: (width,), left out with affine=False; without running statistics, as torch.nn.InstanceNorm2d by default;
    no difference between train and eval. The first axis is the samples. One position alone gives the bias.
    Takes away what a whole image or text has in common. On tokens it leaks the future, in eval as in training: a
    position is centred by all later ones. Raises ValueError on a width below 1 and for an input without
    positions.
    """

    leaks = True
    leaks_in_eval = True

    def __init__(self, width: int, *, axis: int = -1, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        if width < 1:
            raise ValueError(f"norm_layer needs at least 1 channel; got width {width}. Check the model's width")
        self.width, self.axis, self.eps = width, axis, eps
        self.gain = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 3:
            raise ValueError(
                f"norm_layer=instance averages over positions, so it needs three axes or more; got {tuple(x.shape)}. "
                "Try norm_layer=layer"
            )
        if torch.compiler.is_compiling():  # torch's kernel would not be fused with what stands around it
            return self._formula(x)
        # One group per channel; torch's own instance_norm refuses a single position.
        return grouped(x.movedim(self.axis, 1), self.width, self.gain, self.bias, self.eps).movedim(1, self.axis)

    def _formula(self, x: Tensor) -> Tensor:
        h = x.movedim(self.axis, -1).to(wide(x.dtype))
        positions = tuple(range(1, x.dim() - 1))
        var, mean = torch.var_mean(h, positions, correction=0, keepdim=True)
        h, scale = h - mean, (var + self.eps).rsqrt()
        if self.gain is not None and self.bias is not None:
            y = torch.addcmul(self.bias, h, scale * self.gain)  # so the gain's gradient needs no pass of its own
        else:
            y = h * scale
        return y.movedim(-1, self.axis).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.width}, axis={self.axis}, affine={self.gain is not None}"
