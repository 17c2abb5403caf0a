"""A linear layer drawn from N(0, std²), as GPT-2 initializes all of its weights."""

from torch import nn


def linear(inputs: int, outputs: int, *, bias: bool, std: float, writes_stream: bool = False) -> nn.Linear:
    """nn.Linear with weights from N(0, std²) and zero bias.

    writes_stream marks the last layer of a sublayer, whose rows are channels of the residual stream: projections and
    conversions treat those along the other axis.
    """
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    layer.writes_stream = writes_stream  # type: ignore[assignment]
    return layer
